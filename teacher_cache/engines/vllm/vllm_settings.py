"""How Decant starts vLLM: environment defaults, arguments of `LLM`, and what follows from them (seeds, chunked
prefill).

On a CPU the engine core runs inside this process: separate core and worker processes cost two more imports of vLLM and,
on two cores, gain nothing now that results arrive as arrays. Eager execution and an explicit key-value cache skip
compilation and profiling. CPU seconds from import to close, 4-million-parameter model: 10 so, 3 for each further start
in the process; 18 with a core process; 27 with vLLM's own core and worker processes; compiling adds minutes where its
compiler cache is cold. On a GPU vLLM's own defaults stay: a core process of its own, compiled graphs.

vLLM's CPU runner dies on a per-request seed when a prompt is split over two forward passes, so chunked prefill is
switched off there while answers are generated; where the longest sequence does not fit one pass, seeds are left out and
the provenance says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.errors import EngineError
from shared.models.forward.row_length import known_positions, rope_switches
from shared.process.machine import available_bytes, num_cores
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.engines.columns.column_layout import CHUNK_ENTRIES
from teacher_cache.teacher.model_files import resolve_model

MIN_CACHE_BYTES = 2**28
MAX_CACHE_BYTES = 2**35
SEQUENCES_IN_CACHE = 64
"""On a CPU the key-value cache holds this many sequences of the greatest length, within the bounds above."""

ROWS_AT_ONCE = 1024
"""`CHUNK_SIZE` of vllm.v1.worker.gpu.sample.prompt_logprob."""
PLUGIN_BUFFERS = 3
"""Of the plug-in's `CHUNK_ENTRIES`: scores, masses, one of work."""

NARROW = 768
"""Hidden width below which one matrix product is not worth all cores."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONSAFEPATH": "1",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
}
"""Defaults; what the environment already says wins. PYTHONSAFEPATH keeps the directory that a user works in out of what
vLLM's own processes import; the last is what `vllm_numbers` looks at."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Arguments of `LLM` and what they mean for Decant."""

    arguments: dict[str, Any]
    max_model_len: int | None
    """L, prompt and answer together; vLLM gets L + 1, so that a full sequence can be scored with one token sampled
    after it.
    """
    head_dtype: str
    honours_seeds: bool
    on_cpu: bool
    num_threads: int | None
    """Threads of the engine on a CPU; None: torch's default."""


def set_environment() -> None:
    """Set vLLM's environment defaults; call before the first import of vllm, and of torch, which reads one of them
    then.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
        # Said before vLLM reads its own logging level, on every CPU that has a Triton for GPUs.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


def plan_settings(
    teacher: VllmTeacher, capture: Capture | None, generate: Generate | None, model_dir: Path, *, on_cpu: bool
) -> VllmSettings:
    """Work out how to start vLLM.

    Raises:
        EngineError: the model's config cannot be read, or the recipe asks for a longer sequence than the model knows.
    """
    files = resolve_model(str(model_dir))
    text = files.text_config
    longest = text.get("max_position_embeddings")
    length = teacher.max_model_len
    known = known_positions(SimpleNamespace(**text))
    if length is not None and known is not None and length > known:
        raise EngineError(
            f"teacher.max_model_len is {length} but {model_dir} knows {known} positions; lower it or leave it out"
        )
    if length is None and isinstance(longest, int):
        length = longest
    if length is not None and length == longest:
        # The one token sampled after a full sequence is never fed back, so no position beyond the model's last is used.
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    _refuse_other_rotation(text, length, model_dir)
    fits_one_pass = length is not None and length + 1 <= teacher.max_num_batched_tokens
    unchunked = on_cpu and generate is not None and fits_one_pass
    dtype = files.dtype_as(teacher.dtype)  # vLLM's own auto would turn float32 into 16 bits
    head_dtype = _head_dtype(teacher, files.config, dtype)
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": dtype,
        "quantization": teacher.quantization,
        "tensor_parallel_size": teacher.tensor_parallel_size,
        "max_model_len": None if length is None else length + 1,
        "gpu_memory_utilization": teacher.gpu_memory_utilization,
        "max_num_batched_tokens": teacher.max_num_batched_tokens,
        "trust_remote_code": teacher.trust_remote_code,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": not unchunked,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        "worker_extension_cls": "teacher_cache.engines.vllm.vllm_worker.TailWorker",
    }
    if head_dtype == "float32" and dtype != "float32":
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if on_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        arguments["enforce_eager"] = True
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            arguments["kv_cache_memory_bytes"] = cache_bytes(text, (length or 4096) + 1, dtype)
    return VllmSettings(
        arguments,
        length,
        head_dtype,
        honours_seeds=not on_cpu or unchunked,
        on_cpu=on_cpu,
        num_threads=_num_threads(text),
    )


def logprob_bytes(vocab_size: int, max_num_batched_tokens: int) -> int:
    """Return bytes of GPU memory for log-probabilities, which vLLM's own profiling does not see.

    Its V2 runner scores `ROWS_AT_ONCE` rows at a time, whatever the batch: their logits in float32, and the plug-in's
    float32 buffers of a piece of them. `logprob_bytes(151_936, 8192)` -> 1_427_636_224.
    """
    entries = min(max_num_batched_tokens, ROWS_AT_ONCE) * vocab_size
    return 4 * (entries + PLUGIN_BUFFERS * min(entries, CHUNK_ENTRIES["cuda"]))


def _num_threads(text_config: dict[str, Any]) -> int | None:
    """Halve the threads for narrow models, unless the environment says how many.

    Their matrices are too small to share: at width 256 on two cores a second thread adds 14 % speed for 66 % more work,
    and a busy machine then waits at every barrier.
    """
    if os.environ.get("OMP_NUM_THREADS") or int(text_config.get("hidden_size") or NARROW) >= NARROW:
        return None
    return max(1, num_cores() // 2)


def cache_bytes(text_config: dict[str, Any], max_model_len: int, dtype: str) -> int:
    """Return bytes of key-value cache for `SEQUENCES_IN_CACHE` sequences, within bounds and a quarter of the free
    memory.

    Raises:
        EngineError: one sequence does not fit.
    """
    sequence = cache_bytes_per_token(text_config, dtype) * (max_model_len + 256)  # whole blocks
    free = available_bytes()
    if sequence > free // 2:
        raise EngineError(
            f"one sequence of {max_model_len:,} tokens needs {sequence / 2**30:.1f} GiB of key-value cache but "
            f"{free / 2**30:.1f} GiB of memory are free; lower teacher.max_model_len"
        )
    wanted = min(max(SEQUENCES_IN_CACHE * sequence, MIN_CACHE_BYTES), MAX_CACHE_BYTES)
    return max(min(wanted, free // 4), sequence)


def cache_bytes_per_token(text_config: Mapping[str, Any], dtype: str) -> int:
    """Return bytes of key-value cache that a token takes, as far as a config says the model's shape."""
    layers = int(text_config.get("num_hidden_layers") or 32)
    heads = int(text_config.get("num_attention_heads") or 32)
    key_heads = int(text_config.get("num_key_value_heads") or heads)
    head_dim = int(text_config.get("head_dim") or int(text_config.get("hidden_size") or 4096) // heads)
    return 2 * layers * key_heads * head_dim * number_bytes(dtype)


def number_bytes(dtype: str) -> int:
    """Return bytes of one number of a type of weights."""
    return 4 if dtype in ("float32", "float") else 2


def _refuse_other_rotation(text: Mapping[str, Any], length: int | None, model_dir: Path) -> None:
    """Refuse a model whose rotation follows a row's length where vLLM would rotate all rows as it does its longest.

    Raises:
        EngineError: with what to set.
    """
    for kind, most in rope_switches(SimpleNamespace(**text)):
        if kind == "longrope" and length is not None and length < most:  # vLLM is told of one token more
            continue
        ways = f"set teacher.max_model_len to {most - 1} or less, or " if kind == "longrope" else "set "
        raise EngineError(
            f"{model_dir} rotates rows of more than {most} tokens by their length (rope type {kind}), and vLLM rotates "
            f"every row as its longest; {ways}teacher.engine to transformers"
        )


def _head_dtype(teacher: VllmTeacher, config: dict[str, Any], dtype: str) -> str:
    """Return the head's type: float32 where asked and where the head is not quantised."""
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("lm_head"):
        return "quantised"
    return "float32" if teacher.head_dtype == "float32" else dtype

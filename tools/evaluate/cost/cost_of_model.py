"""The process that measures one model once: loaded, warmed up, timed. Started by `cost`, never by hand.

Time to first token: median over the prompts of a whole request for one token. Tokens per second: answers one after
another, and all prompts at once (batched). Memory: on a GPU the allocator's peak (with vLLM what the device has in use,
most of which is its own reservation for the cache of keys and values); on a CPU the peak of resident memory of all
processes of the model, and how much of it came after the libraries were imported.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Generate, Recipe
from shared.recipe.sections.teacher import is_one_process
from teacher_cache.engines.protocol import GenerateRequest
from tools.evaluate.cost.cost import cost_prompts
from tools.evaluate.models.generate_answers import Ask, open_for
from tools.evaluate.models.model_ends import taught_end_ids
from tools.evaluate.models.model_process import serve
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.side_by_side.side_prompts import prompt_ids, sources_of

LONGEST_ANSWER = 64
ALONE = 4
"""Prompts that are answered one after another."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def measure_model(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the figures of one model, measured once.

    Raises:
        EvaluationError: it cannot be asked.
        EngineError: its engine cannot start.
    """
    model = model_under_test(recipe, name)
    tokenizer = load_fast_tokenizer(model.files.directory, trust_remote_code=model.trust_remote_code)
    prompts = cost_prompts(recipe)
    ids = prompt_ids(recipe, prompts, model, tokenizer)
    length = min(LONGEST_ANSWER, recipe.evaluate.max_new_tokens)
    import torch

    before = resident_bytes("VmRSS")
    ends = taught_end_ids(recipe, tokenizer, sources_of(prompts))
    ask = Ask("cost", ids, [prompt.place for prompt in prompts], length, end_token_ids=ends)
    engine = open_for(model, recipe, [ask])
    try:
        _timed(engine, ids[:1], ends, min(8, length))
        first = [_timed(engine, [prompt], ends, 1)[1] for prompt in ids]
        alone = [_timed(engine, [prompt], ends, length) for prompt in ids[:ALONE]]
        together = _timed(engine, ids, ends, length)
        memory, what = _peak_memory(torch, recipe.evaluate.engine)
        provenance = dict(engine.provenance())
    finally:
        engine.close()
    return {
        **parameter_figures(model),
        "memory_bytes": memory,
        "memory_of": what,
        "memory_above_start_bytes": memory - before if what.startswith("resident") else None,
        "seconds_to_first_token": statistics.median(first),
        "tokens_per_second": sum(tokens for tokens, _ in alone) / sum(seconds for _, seconds in alone),
        "tokens_per_second_batched": together[0] / together[1],
        "answered_tokens": together[0],
        "engine": provenance.get("engine"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def parameter_figures(model: ModelUnderTest) -> dict[str, int | None]:
    """Return parameters and the bytes of the weights at run time, from the headers of safetensors; None without.

    Weights that are stored quantised are packed, so their count is unknown and their bytes are those on disk.
    """
    from safetensors import safe_open

    files = sorted(Path(model.files.directory).glob("*.safetensors"))
    if not files:
        return {"parameters": None, "weights_bytes": None}
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as opened:
            names = opened.keys()
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    if "quantization_config" in model.files.config:
        return {"parameters": None, "weights_bytes": sum(path.stat().st_size for path in files)}
    dtype = model.files.dtype_as(model.dtype)
    whole = None if model.quantization is not None else count * _BYTES.get(dtype, 4)
    return {"parameters": count, "weights_bytes": whole}


def resident_bytes(what: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (at its peak) of this process and those of its group, in bytes."""
    group, total = os.getpgid(0), 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group:
                    lines = (entry / "status").read_text().splitlines()
                    total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
            except OSError:  # it ended meanwhile
                continue
    return total


def _timed(
    engine: Any, prompts: Sequence[Sequence[int]], ends: tuple[int, ...], max_new_tokens: int
) -> tuple[int, float]:
    """Answer prompts and return (tokens, seconds)."""
    requests = [GenerateRequest(number, 0, list(prompt), number, ends) for number, prompt in enumerate(prompts)]
    greedy = Generate(temperature=0.0, max_new_tokens=max_new_tokens, seed=0)
    started = time.perf_counter()
    tokens = sum(len(done.token_ids) for done in engine.generate(iter(requests), greedy))
    return tokens, time.perf_counter() - started


def _peak_memory(torch: Any, engine: str) -> tuple[int, str]:
    if not torch.cuda.is_available():
        return resident_bytes("VmHWM"), "resident memory of its processes"
    if is_one_process(engine):
        return int(torch.cuda.max_memory_allocated()), "CUDA memory allocated"
    free, total = torch.cuda.mem_get_info()
    return int(total - free), "CUDA memory of the device in use, vLLM's reservation included"


def _work(job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    return measure_model(Recipe.model_validate_json(job["recipe"]), job["model"])


if __name__ == "__main__":
    serve(_work)

"""What a recipe may say about the teacher: which model, run by which engine, on how many machines.

A server was started by somebody else: what decides how it runs is said there, so settings of Decant's own engines are
refused beside `engine: server` instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from shared.recipe.base import (
    Count,
    CountOrZero,
    NonNegative,
    Probability,
    Problem,
    Section,
    Text,
    inconsistent,
    moved,
    quoted,
    repeated,
    unused,
)

KEY_VARIABLE = "DECANT_SERVER_API_KEY"
"""Environment variable with the servers' API key."""
_OF_THE_SERVER = {"tensor_parallel_size", "gpu_memory_utilization", "max_num_batched_tokens"}
_OF_THIS_ENGINE = {"servers", "server_requests", "server_patience_seconds"}
_READ_BY: dict[str, tuple[str, ...]] = {
    "gpu_memory_utilization": ("vllm",),
    "max_num_batched_tokens": ("vllm",),
    "batch_tokens": ("transformers",),
}
"""Setting to the engines that read it; the teacher's section may hold it for what else of a recipe runs there."""


def address_problem(url: str) -> str | None:
    """Say what is wrong with a server's address, without repeating a password in it, or None.

    An address must not carry a password, because recipes are written into run directories.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        return f"an address must hold no user or password, because recipes are kept; put an API key into {KEY_VARIABLE}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isascii() or " " in url:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.query or parts.fragment:
        return "an address must end with its path, such as http://127.0.0.1:8000/v1; leave out what follows '?' or '#'"
    return None


class Workers(Section):
    """Many engines for one build, each in a Ray actor of its own."""

    backend: Literal["ray"] = "ray"
    """What places and restarts the engines."""
    count: Count = 1
    """Engines at work."""
    gpus_per_engine: CountOrZero = 1
    """GPUs of one engine, its `tensor_parallel_size`; 0 for engines on CPUs."""


class Teacher(Section):
    """The model whose distributions are captured."""

    model: Text
    """A directory or a hub id."""
    revision: str | None = None
    """Revision of a hub id."""
    engine: Literal["vllm", "transformers", "server"] = "vllm"
    """What runs the teacher: vllm in process, transformers as the reference, or running vLLM servers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights at run time."""
    quantization: str | None = None
    """Quantisation scheme that the engine applies, such as fp8; a quantised checkpoint says its own."""
    adapter: str | None = None
    """A LoRA directory applied to the teacher, folded into its weights before the engine starts."""
    tensor_parallel_size: Count = 1
    """GPUs that share one copy of the model."""
    max_model_len: Count | None = None
    """Longest sequence in tokens, prompt and answer together; left out: the model's own limit."""
    gpu_memory_utilization: Probability = 0.85
    """Share of the GPU's memory that vLLM may take; its profiling does not see log-probabilities, so leave room."""
    max_num_batched_tokens: Count = 8192
    """Tokens in one forward pass of vLLM; bounds the memory for log-probabilities."""
    head_dtype: Literal["auto", "float32"] = "float32"
    """Type of the output head; float32 avoids the ties of bfloat16 logits."""
    trust_remote_code: bool = False
    """Run Python that comes with the model."""
    servers: tuple[Text, ...] = ()
    """Addresses of running `vllm serve` endpoints, for engine `server`; an API key comes from DECANT_SERVER_API_KEY."""
    server_requests: Annotated[Count, Field(le=1024)] = 64
    """Requests in flight at each server."""
    server_patience_seconds: NonNegative = 600.0
    """How long a build waits, in seconds, when no server answers."""
    workers: Workers | None = None
    """Many engines for one build."""
    batch_tokens: Count = 4096
    """Padded tokens in one batch of the transformers engine."""

    @model_validator(mode="after")
    def _exists_in_this_build(self) -> Teacher:
        problems: list[Problem] = _server_problems(self)
        if self.adapter is not None and self.quantization is not None:
            why = (
                "it is folded into the weights, which `quantization` then changes; merge it beforehand and leave "
                "one of both out"
            )
            problems.append((("adapter",), why))
        if self.workers is not None:
            problems += _misplaced(self.workers, self.engine, self.tensor_parallel_size)
        if self.engine == "transformers":
            if self.tensor_parallel_size != 1:
                problems.append(
                    (("tensor_parallel_size",), "the transformers engine runs in one process; leave it out or use vllm")
                )
            if self.quantization is not None:
                problems.append(
                    (("quantization",), "the transformers engine does not quantise; leave it out or use vllm")
                )
        if problems:
            inconsistent(*problems)
        return self


def unread_settings(teacher: Teacher, engines: Collection[str]) -> list[Problem]:
    """Return the settings of a teacher that none of the engines at work reads."""
    return [
        ((name,), f"only the engine {quoted(_READ_BY[name])} reads it, which nothing here runs on; leave it out")
        for name in sorted(moved(teacher) & _READ_BY.keys())
        if not set(_READ_BY[name]) & set(engines) and not (teacher.engine == "server" and name in _OF_THE_SERVER)
    ]


def engine_of_student(teacher: Teacher, wanted: str | None) -> str:
    """Return what lets a student answer in rounds: what a stage wants, or the teacher's engine where that is ours."""
    return wanted or ("vllm" if teacher.engine == "server" else teacher.engine)


def as_on(engine: str) -> dict[str, Any]:
    """Return what changes in a section that one of our own engines opens: what it does not read is at its default."""
    unread = _OF_THIS_ENGINE | {name for name, readers in _READ_BY.items() if engine not in readers}
    return {"engine": engine, **{name: Teacher.model_fields[name].default for name in unread}}


def _misplaced(workers: Workers, engine: str, tensor_parallel_size: int) -> list[Problem]:
    """Return what of `workers` cannot be honoured."""
    gpus = workers.gpus_per_engine
    if engine == "server":
        return [(("workers",), "servers are shared out by one process; leave it out and list them in `servers`")]
    if gpus not in (0, tensor_parallel_size):
        return [
            (
                ("workers", "gpus_per_engine"),
                f"an engine uses tensor_parallel_size = {tensor_parallel_size} GPUs, so {gpus} cannot be; write "
                f"{tensor_parallel_size}, or 0 for engines on CPUs",
            )
        ]
    return []


def _server_problems(teacher: Teacher) -> list[Problem]:
    """Return what a `teacher` section says about servers and cannot be honoured."""
    if teacher.engine != "server":
        why = f"only the engine 'server' asks servers and this teacher's engine is '{teacher.engine}'; leave it out"
        return unused(teacher, _OF_THIS_ENGINE, why)
    problems: list[Problem] = []
    if not teacher.servers:
        problems.append(
            (("servers",), "the engine 'server' needs at least one address, such as http://127.0.0.1:8000/v1")
        )
    again = set(repeated(url.rstrip("/").removesuffix("/v1") for url in teacher.servers))
    for i, url in enumerate(teacher.servers):
        problem = address_problem(url) or ("the same server is listed twice" if i in again else None)
        if problem:
            problems.append((("servers", i), problem))
    why = "a server is started by `vllm serve`, which decides this there; leave it out"
    problems += unused(teacher, _OF_THE_SERVER, why)
    if teacher.quantization is not None:
        problems.append(
            (
                ("quantization",),
                "a server does not tell how it quantises, so a layer could not say it either; leave it out and let "
                "`model` be "
                "a quantised checkpoint, or use vllm",
            )
        )
    if teacher.workers is not None:
        problems.append(
            (("workers",), "servers are engines already, so list them all under `servers` and leave it out")
        )
    return problems

"""What a recipe may say about the teacher: which model, run by which engine, on how many machines.

One section per engine, told apart by `engine`, with what that engine has. A server was started by somebody else, so
what decides how it runs is said there. Of one section several engines may read: hidden layers run on transformers
beside vLLM, and a student answers on either, so what one of these two reads alone is refused by `unread_settings`,
which knows what a recipe runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from shared.recipe.base import (
    Count,
    CountOrZero,
    HomePath,
    Kinds,
    NonNegative,
    Probability,
    Problem,
    Section,
    Text,
    moved,
    quoted,
    repeated,
)

KEY_VARIABLE = "DECANT_SERVER_API_KEY"
"""Environment variable with the servers' API key."""
_READ_BY: dict[str, tuple[str, ...]] = {
    "gpu_memory_utilization": ("vllm",),
    "max_num_batched_tokens": ("vllm",),
    "batch_tokens": ("transformers",),
}
"""Setting to the engines that read it; a section of another may hold it for what else of a recipe runs there."""


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


class AnyTeacher(Section):
    """The model whose distributions are captured."""

    is_served: ClassVar[bool] = False
    """Somebody else started what runs it."""
    is_one_process: ClassVar[bool] = False
    """Its engine computes in the process that opens it, by torch alone."""
    model: HomePath
    """A directory or a hub id."""
    revision: Text | None = None
    """Revision of a hub id."""
    engine: str
    """Which kind it is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights at run time."""
    adapter: HomePath | None = None
    """A LoRA directory applied to the teacher: folded into its weights before the engine starts, or served."""
    max_model_len: Count | None = None
    """Longest sequence in tokens, prompt and answer together; left out: the model's own limit."""
    head_dtype: Literal["auto", "float32"] = "float32"
    """Type of the output head; float32 avoids the ties of bfloat16 logits."""
    trust_remote_code: bool = False
    """Run Python that comes with the model."""
    batch_tokens: Count = 4096
    """Padded tokens in one batch of the transformers engine, of whatever runs there: hidden layers, or a student."""


class InProcess(AnyTeacher):
    """A teacher that Decant runs itself."""

    servers: ClassVar[tuple[str, ...]] = ()
    gpu_memory_utilization: Probability = 0.85
    """Share of the GPU's memory that vLLM may take; its profiling does not see log-probabilities, so leave room."""
    max_num_batched_tokens: Count = 8192
    """Tokens in one forward pass of vLLM; bounds the memory for log-probabilities."""
    workers: Workers | None = None
    """Many engines for one build."""


def _misfits(section: VllmTeacher | TransformersTeacher) -> Iterator[Problem]:
    """Name what one of our engines cannot do."""
    shards, workers = section.tensor_parallel_size, section.workers
    if workers is not None and workers.gpus_per_engine not in (0, shards):
        said = (
            f"an engine uses tensor_parallel_size = {shards} GPUs, so {workers.gpus_per_engine} cannot be; write "
            f"{shards}, or 0 for engines on CPUs"
        )
        yield ("workers", "gpus_per_engine"), said
    if section.adapter is not None and section.quantization is not None:
        why = "it is folded into the weights, which `quantization` then changes"
        yield ("adapter",), f"{why}; merge it beforehand and leave one of both out"


class VllmTeacher(InProcess):
    """The model whose distributions are captured, by vLLM."""

    engine: Literal["vllm"] = "vllm"
    """vLLM, in process."""
    quantization: Text | None = None
    """Quantisation scheme that the engine applies, such as fp8; a quantised checkpoint says its own."""
    tensor_parallel_size: Count = 1
    """GPUs that share one copy of the model."""

    def _problems(self) -> Iterator[Problem]:
        return _misfits(self)


class TransformersTeacher(InProcess):
    """The model whose distributions are captured, by the slow reference."""

    is_one_process: ClassVar[bool] = True
    quantization: ClassVar[None] = None
    tensor_parallel_size: ClassVar[int] = 1
    engine: Literal["transformers"]
    """transformers, in one process."""

    def _problems(self) -> Iterator[Problem]:
        return _misfits(self)


class ServedTeacher(AnyTeacher):
    """The model whose distributions are captured, by servers that somebody else started."""

    is_served: ClassVar[bool] = True
    quantization: ClassVar[None] = None
    tensor_parallel_size: ClassVar[int] = 1
    max_num_batched_tokens: ClassVar[int] = 8192  # what the plan counts with; the server decides
    workers: ClassVar[None] = None
    engine: Literal["server"]
    """Running `vllm serve` endpoints."""
    servers: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Their addresses, such as http://127.0.0.1:8000/v1; an API key comes from DECANT_SERVER_API_KEY."""
    server_requests: Annotated[Count, Field(le=1024)] = 64
    """Requests in flight at each server."""
    server_patience_seconds: NonNegative = 600.0
    """How long a build waits, in seconds, when no server answers."""

    def _problems(self) -> Iterator[Problem]:
        again = set(repeated(url.rstrip("/").removesuffix("/v1") for url in self.servers))
        for i, url in enumerate(self.servers):
            problem = address_problem(url) or ("the same server is listed twice" if i in again else None)
            if problem:
                yield ("servers", i), problem


_Kind = VllmTeacher | TransformersTeacher | ServedTeacher
_VERSION_1 = (
    *("revision", "dtype", "adapter", "max_model_len", "head_dtype", "trust_remote_code", "batch_tokens"),
    *("gpu_memory_utilization", "max_num_batched_tokens", "workers", "quantization", "tensor_parallel_size"),
    *("servers", "server_requests", "server_patience_seconds"),
)
_KINDS = Kinds(_Kind, "engine", _VERSION_1)
Teacher = Annotated[_Kind, Field(discriminator="engine"), BeforeValidator(_KINDS.checked)]
"""Any of them; without an `engine`, `VllmTeacher`."""


def unread_settings(teacher: Teacher, engines: Collection[str]) -> list[Problem]:
    """Return the settings of a teacher that none of the engines at work reads."""
    own = type(teacher).model_fields.keys() & set(_VERSION_1)
    written = moved(teacher) if _KINDS.is_dump(teacher.model_fields_set, own) else teacher.model_fields_set
    return [
        ((name,), f"only the engine {quoted(_READ_BY[name])} reads it, which nothing here runs on; leave it out")
        for name in sorted(written & _READ_BY.keys())
        if not set(_READ_BY[name]) & set(engines)
    ]


def engine_of_student(teacher: Teacher, wanted: str | None) -> str:
    """Return what lets a student answer in rounds: what a stage wants, or the teacher's transformers, or vLLM."""
    return wanted or ("transformers" if teacher.engine == "transformers" else "vllm")


def is_one_process(engine: str) -> bool:
    """Return whether an engine computes in the process that opens it, which then may be forked and counts its memory.

    >>> [is_one_process(engine) for engine in ("vllm", "transformers")]
    [False, True]
    """
    kind = cast("type[AnyTeacher]", _KINDS.named[engine])
    return kind.is_one_process


def on_engine(engine: str, teacher: Teacher, **changes: Any) -> Teacher:
    """Return a section for an engine: what that reads of a teacher's section, and of some changes."""
    kind = _KINDS.named[engine]
    read = {name for name in kind.model_fields if engine in _READ_BY.get(name, (engine,))}
    settings = {name: value for name, value in {**dict(teacher), **changes}.items() if name in read}
    return cast("Teacher", kind.model_validate({**settings, "engine": engine}))

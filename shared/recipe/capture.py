"""What a recipe may say about phase 1: teacher, prompts, how to answer, what to capture."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from shared.recipe.base import (
    Count,
    CountOrZero,
    Fraction,
    Integer,
    NonNegative,
    Number,
    Positive,
    Probability,
    Problem,
    Section,
    Text,
    inconsistent,
)
from shared.recipe.hidden import HiddenCapture
from shared.recipe.servers import teacher_problems
from shared.recipe_prompts import PromptSource
from shared.schema import MAX_DRAWS, MAX_GAP_STEP, MAX_K, MAX_TEMPERATURES, MIN_GAP_STEP


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
        problems: list[Problem] = teacher_problems(self)
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


class Generate(Section):
    """How the teacher answers the prompts; left out of the recipe: the data's own answers are scored."""

    NAMES_THE_JOB: ClassVar[frozenset[str]] = frozenset(
        (
            "temperature",
            "top_p",
            "top_k",
            "stop",
            "seed",
            "samples_per_prompt",
            "max_new_tokens",
            "keep_truncated",
            "model",
        )
    )
    """Fields that a job's request has always held; a later one joins it where it is not at its default."""

    temperature: NonNegative = 1.0
    """Sampling temperature; 0 takes the most probable token."""
    top_p: Probability = 1.0
    """Sample from the most probable tokens that reach this mass."""
    top_k: CountOrZero = 0
    """Sample from this many most probable tokens; 0 means all."""
    stop: tuple[Text, ...] = ()
    """Texts that end an answer, besides the end token."""
    seed: Integer | None = None
    """Seed of the answers; left out: the recipe's."""
    samples_per_prompt: Count = 1
    """Answers per prompt."""
    max_new_tokens: Count = 512
    """Longest answer in tokens."""
    keep_truncated: bool = True
    """Keep answers that were cut by length."""
    model: Text | None = None
    """Let another model than the teacher answer, such as a student: a directory or a hub id with the teacher's
    tokenizer.
    """

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Generate:
        problems: list[Problem] = []
        if self.temperature == 0 and self.samples_per_prompt > 1:
            problems.append(
                (
                    ("samples_per_prompt",),
                    "all answers at temperature 0 are the same; raise the temperature or leave it at 1",
                )
            )
        if problems:
            inconsistent(*problems)
        return self


def _with_one(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({*temperatures, 1.0}))


class Capture(Section):
    """What is kept of the teacher's next-token distribution at each supervised position."""

    mode: Literal["top", "sample", "top+sample"] = "top"
    """top: the most probable tokens, exactly, and the mass of the rest; sample: draws from all; top+sample: both."""
    k: Annotated[CountOrZero, Field(le=MAX_K)] = 64
    """Most probable tokens per position, at most; 0 in mode sample."""
    draws: Annotated[CountOrZero, Field(le=MAX_DRAWS)] = 0
    """Tokens drawn per position and temperature, from the rest (top+sample) or from everything (sample)."""
    mass: Probability = 1.0
    """Stop before k once this much probability is covered, at the highest declared temperature."""
    temperatures: Annotated[tuple[Positive, ...], AfterValidator(_with_one), Field(max_length=MAX_TEMPERATURES)] = (
        1.0,
    )
    """Temperatures at which the mass of the rest is stored exactly; 1 is always among them."""
    gap_step: Annotated[Number, Field(ge=MIN_GAP_STEP, le=MAX_GAP_STEP)] = 0.0625
    """Quantisation step of log-probabilities, in nats."""
    hidden: HiddenCapture | None = None
    """A hidden layer beside the targets: states, a pooled state or attention of the teacher; left out: none."""

    @model_validator(mode="before")
    @classmethod
    def _sample_has_no_head(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("mode") == "sample" and "k" not in data:
            return {**data, "k": 0}
        return data

    @model_validator(mode="after")
    def _mode_has_what_it_needs(self) -> Capture:
        problems: list[Problem] = []
        if "top" in self.mode and self.k < 1:
            problems.append(
                (("k",), f"mode '{self.mode}' keeps the most probable tokens and needs k of at least 1, not {self.k}")
            )
        if "sample" in self.mode and self.draws < 1:
            problems.append(
                (("draws",), f"mode '{self.mode}' draws tokens and needs draws of at least 1, not {self.draws}")
            )
        if self.mode == "top" and self.draws:
            problems.append((("draws",), f"mode 'top' draws nothing, so draws: {self.draws} needs mode 'top+sample'"))
        if self.mode == "sample" and self.k:
            problems.append((("k",), f"mode 'sample' keeps no exact tokens, so k: {self.k} needs mode 'top+sample'"))
        if self.mode == "sample" and self.mass != 1.0:
            problems.append(
                (("mass",), f"mode 'sample' has no head to stop, so mass: {self.mass:g} needs mode 'top+sample'")
            )
        if problems:
            inconsistent(*problems)
        return self


class Heldout(Section):
    """Prompts that no stage trains on."""

    fraction: Annotated[Fraction, Field(lt=1)] = 0.05
    """Share of prompt groups held out, chosen by a hash of the prompt."""


__all__ = ["Capture", "Generate", "Heldout", "PromptSource", "Teacher", "Workers"]

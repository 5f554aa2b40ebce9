"""What a recipe may say about what is kept of the teacher's distributions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from shared.recipe.base import (
    CountOrZero,
    Number,
    Positive,
    Probability,
    Problem,
    Section,
    inconsistent,
)
from shared.recipe.sections.hidden import HiddenCapture
from shared.schema import MAX_DRAWS, MAX_GAP_STEP, MAX_K, MAX_TEMPERATURES, MIN_GAP_STEP


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
    label: Literal["apart", "head"] = "apart"
    """Where the log-probability of the token that follows is kept: apart alone, or also in the head where it would be
    outside of it, as `reverse_kl`, `skew_reverse_kl` and `jsd` need it on the student's own answers."""
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
        if self.label == "head" and (self.mode == "sample" or self.k == MAX_K):
            why = "mode 'sample' keeps no head" if self.mode == "sample" else f"k of {MAX_K} leaves no room"
            problems.append((("label",), f"{why}, so the label cannot be in it; leave it out"))
        if self.mode == "sample" and self.k:
            problems.append((("k",), f"mode 'sample' keeps no exact tokens, so k: {self.k} needs mode 'top+sample'"))
        if self.mode == "sample" and self.mass != 1.0:
            problems.append(
                (("mass",), f"mode 'sample' has no head to stop, so mass: {self.mass:g} needs mode 'top+sample'")
            )
        if problems:
            inconsistent(*problems)
        return self


def server_problems(capture: Capture) -> list[Problem]:
    """Return what a `capture` section asks for that no server returns."""
    problems: list[Problem] = []
    if capture.mode != "top":
        problems.append(
            (("capture", "mode"), f"a server returns no drawn tokens, so '{capture.mode}' needs teacher.engine 'vllm'")
        )
    if capture.temperatures != (1.0,):
        problems.append(
            (
                ("capture", "temperatures"),
                "a server returns no tails at other temperatures than 1; use teacher.engine 'vllm'",
            )
        )
    return problems

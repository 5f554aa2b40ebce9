"""What a recipe may say about what is kept of the teacher's distributions: one section per kind, told apart by `mode`.

What a kind has no option for is a constant of it, so that a reader need not ask which kind it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from shared.recipe.base import Count, Kinds, Number, Positive, Probability, Problem, Section
from shared.recipe.sections.hidden import HiddenCapture
from shared.schema import MAX_DRAWS, MAX_GAP_STEP, MAX_K, MAX_TEMPERATURES, MIN_GAP_STEP

Draws = Annotated[Count, Field(le=MAX_DRAWS)]


def _with_one(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({*temperatures, 1.0}))


class AnyCapture(Section):
    """What is kept of the teacher's next-token distribution at each supervised position."""

    mode: str
    """Which kind it is."""
    temperatures: Annotated[tuple[Positive, ...], AfterValidator(_with_one), Field(max_length=MAX_TEMPERATURES)] = (
        1.0,
    )
    """Temperatures at which the mass of the rest is stored exactly; 1 is always among them."""
    gap_step: Annotated[Number, Field(ge=MIN_GAP_STEP, le=MAX_GAP_STEP)] = 0.0625
    """Quantisation step of log-probabilities, in nats."""
    hidden: HiddenCapture | None = None
    """A hidden layer beside the targets: states, a pooled state or attention of the teacher; left out: none."""


class HeadCapture(AnyCapture):
    """The most probable tokens, exactly, and the mass of the rest."""

    k: Annotated[Count, Field(le=MAX_K)] = 64
    """Most probable tokens per position, at most."""
    mass: Probability = 1.0
    """Stop before k once this much probability is covered, at the highest declared temperature."""
    label: Literal["apart", "head"] = "apart"
    """Where the log-probability of the token that follows is kept: apart alone, or also in the head where it would be
    outside of it, as `reverse_kl`, `skew_reverse_kl` and `jsd` need it on the student's own answers."""

    def _problems(self) -> Iterator[Problem]:
        if self.label == "head" and self.k == MAX_K:
            yield ("label",), f"k of {MAX_K} leaves no room, so the label cannot be in it; leave it out"


class TopCapture(HeadCapture):
    """The most probable tokens, exactly, and the mass of the rest."""

    draws: ClassVar[int] = 0
    mode: Literal["top"] = "top"
    """The most probable tokens."""


class SampleCapture(AnyCapture):
    """Tokens drawn from the whole distribution."""

    k: ClassVar[int] = 0
    mass: ClassVar[float] = 1.0
    label: ClassVar[Literal["apart"]] = "apart"
    mode: Literal["sample"]
    """Draws from all tokens."""
    draws: Draws
    """Tokens drawn per position and temperature, from everything."""


class TopSampleCapture(HeadCapture):
    """The most probable tokens, exactly, the mass of the rest, and tokens drawn from the rest."""

    mode: Literal["top+sample"]
    """The most probable tokens, and draws from the rest."""
    draws: Draws
    """Tokens drawn per position and temperature, from the rest."""


_Kind = TopCapture | SampleCapture | TopSampleCapture
_KINDS = Kinds(_Kind, "mode", ("k", "draws", "mass", "temperatures", "gap_step", "hidden"))
Capture = Annotated[_Kind, Field(discriminator="mode"), BeforeValidator(_KINDS.checked)]
"""Any of them; without a `mode`, `TopCapture`."""


def server_problems(capture: Capture) -> Iterator[Problem]:
    """Yield what a `capture` section asks for that no server returns."""
    if capture.mode != "top":
        drawn = f"a server returns no drawn tokens, so '{capture.mode}' needs teacher.engine 'vllm'"
        yield ("capture", "mode"), drawn
    if capture.temperatures != (1.0,):
        why = "a server returns no tails at other temperatures than 1; use teacher.engine 'vllm'"
        yield ("capture", "temperatures"), why

"""What a recipe may say about the course of a stage: evaluation while it trains, when it stops, what is drawn more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from shared.recipe.base import (
    Count,
    CountOrZero,
    Fraction,
    Kind,
    NonNegative,
    Positive,
    Probability,
    Problem,
    Section,
    unused,
)


class EarlyStopping(Section):
    """When a stage ends before its last step."""

    patience: Count
    """Evaluations in a row without a better held-out KL, after which the stage ends."""
    min_delta_nats: NonNegative = 0.0
    """By how much the held-out KL must fall below the best so far to count as better."""


class StageEvaluation(Section):
    """Held-out figures while a stage trains: before the first step, every so many steps and after the last."""

    every_steps: Count
    """Optimizer steps between evaluations."""
    rows_per_source: Count = 64
    """Held-out rows to measure, at most, of each source; always the same ones."""
    samples: CountOrZero = 0
    """Held-out prompts that the student answers beside the cached answer, greedily."""
    sample_tokens: Count = 64
    """Longest of these answers, in tokens."""
    early_stopping: EarlyStopping | None = None
    """Left out: every step is made."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest held-out KL, and make its weights the stage's model."""

    def _problems(self) -> Iterator[Problem]:
        if self.samples == 0 and self.sample_tokens != 64:
            yield ("sample_tokens",), "there are no samples, so leave it out, or set samples"

    @property
    def decides(self) -> bool:
        """Return whether the stage's weights depend on it."""
        return self.early_stopping is not None or self.keep_best


class Sampling(Section):
    """Shares of the sources that follow their held-out KL: what evaluates worse is drawn more."""

    NAMES_THE_PLAN: ClassVar[frozenset[str]] = frozenset(("kind", "every_steps", "floor", "ceiling", "smoothing"))
    """Fields that a plan's hash has always held; a later one joins it where it is not at its default."""

    kind: Literal["evaluation"]
    """By the stage's evaluations."""
    every_steps: Count | None = None
    """Optimizer steps between changes, a multiple of evaluate.every_steps; left out: the same."""
    floor: Fraction = 0.0
    """Smallest share of a source."""
    ceiling: Probability = 1.0
    """Largest share of a source."""
    smoothing: Fraction = 0.5
    """How much of the shares before is kept at each change; 0 follows the last evaluation alone."""

    def _problems(self) -> Iterator[Problem]:
        if self.floor >= self.ceiling:
            yield ("floor",), f"the floor {self.floor:g} is not below the ceiling {self.ceiling:g}"
        if self.smoothing == 1:
            yield ("smoothing",), "1 keeps the shares as they are for ever; lower it, or leave `sampling` out"


class Balance(Kind):
    """What moves the weights of a stage's losses against each other."""

    kind: Literal["fixed", "grad_norm", "uncertainty"] = "fixed"
    """fixed: nothing; grad_norm: by strength of gradients (GradNorm) at the states that all losses share, the last
    hidden ones or below the lowest layer that hidden or attention read; uncertainty: by learned variances (Kendall)."""
    every_steps: Count = 5
    """Optimizer steps between measurements of gradient norms, for grad_norm."""
    alpha: NonNegative = 1.5
    """How much more a loss that falls slowly is pulled, for grad_norm; 0 makes all gradients equally strong."""
    learning_rate: Positive = 0.025
    """How fast weights move."""

    def _problems(self) -> list[Problem]:
        foreign = {"fixed": ("every_steps", "alpha", "learning_rate"), "uncertainty": ("every_steps", "alpha")}
        return unused(self, foreign.get(self.kind, ()), f"'{self.kind}' does not use it, so leave it out")

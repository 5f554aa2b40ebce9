"""What a recipe may say about the course of a stage: evaluation while it trains, when it stops, which weights it keeps."""

from __future__ import annotations

from pydantic import model_validator

from shared.recipe_base import Count, CountOrZero, NonNegative, Section, inconsistent


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

    @model_validator(mode="after")
    def _options_belong_to_it(self) -> StageEvaluation:
        if self.samples == 0 and self.sample_tokens != 64:
            inconsistent((("sample_tokens",), "there are no samples, so leave it out, or set samples"))
        return self

    @property
    def decides(self) -> bool:
        """Return whether the stage's weights depend on it."""
        return self.early_stopping is not None or self.keep_best


__all__ = ["EarlyStopping", "StageEvaluation"]

"""What a recipe may say about how the teacher answers prompts."""

from __future__ import annotations

from typing import ClassVar

from shared.recipe.base import (
    Count,
    CountOrZero,
    HomePath,
    Integer,
    NonNegative,
    Probability,
    Problem,
    Section,
    Text,
    unused_sampling,
)


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
    DRAWS_NO_OTHER: ClassVar[frozenset[str]] = frozenset(("samples_per_prompt", "keep_truncated", "model"))
    """Fields that leave an answer what it is; every other, also a later one that is not at its default, makes another
    row of the same prompt. Which model answers stands in the row by its weights."""

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
    model: HomePath | None = None
    """Let another model than the teacher answer, such as a student: a directory or a hub id with the teacher's
    tokenizer.
    """

    def _problems(self) -> list[Problem]:
        return unused_sampling(self)

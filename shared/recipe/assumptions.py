"""What `decant plan` may reckon with where a model or a data set cannot be reached: sizes that the recipe states.

A recipe at true size names models and data on a hub. On a machine that reaches none, its price can still be worked out
from what its author knows. Nothing but the plan reads this section; what can be reached is counted instead; every
figure that rests on it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from shared.recipe.base import Count, CountOrZero, Problem, Section


class AssumedModel(Section):
    """The shape of a model, as its config.json on the hub has it."""

    config: dict[str, Any]
    """Values of the model's transformers config; `model_type` is needed, what is left out is that type's default."""

    def _problems(self) -> Iterator[Problem]:
        if not isinstance(self.config.get("model_type"), str):
            yield ("config",), "needs `model_type`, such as qwen3"


class AssumedSource(Section):
    """The size of one source of prompts."""

    rows: Count
    """Prompts."""
    prompt_tokens: Count
    """Mean tokens of a rendered prompt."""
    answer_tokens: CountOrZero
    """Mean tokens of an answer, given or generated."""


class Assume(Section):
    """Sizes that the plan takes where hub or data are out of reach."""

    teacher: AssumedModel | None = None
    """The teacher's shape."""
    student: AssumedModel | None = None
    """The student's shape."""
    sources: dict[str, AssumedSource] = Field(default_factory=dict)
    """Size of each source of `prompts`, by its label."""

"""What a recipe may say about rounds of a stage: the student answers, the teacher scores, the stage trains, again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from shared.recipe.base import (
    Count,
    Fraction,
    Integer,
    NonNegative,
    Positive,
    Probability,
    Problem,
    Section,
    ShareOrNumber,
    unused_sampling,
)
from shared.recipe.sections.prompts import PromptSource


class Guards(Section):
    """Bounds of a round's answers; a round beyond one of them stops the run with the last good model."""

    cut: Fraction = 0.5
    """Largest share of answers that were cut by their length; raise it to 1 where `max_new_tokens` is meant to cut."""
    repeating: Fraction = 0.2
    """Largest share of answers of which more than half of the runs of four tokens came before in the same answer."""
    shortest: NonNegative = 0.2
    """Smallest mean length of the answers, as a multiple of the mean length in the recipe's cache."""
    longest: Positive = 4.0
    """Largest mean length, likewise."""

    def _problems(self) -> Iterator[Problem]:
        if self.shortest >= self.longest:
            said = f"no length lies between {self.shortest:g} and {self.longest:g}; lower it, or raise longest"
            yield ("shortest",), said


class Rounds(Section):
    """In each round the student answers prompts, the teacher scores those answers, and the stage trains on them."""

    count: Count = 1
    """Rounds, one after another; `trainer` is that of each round."""
    prompts: ShareOrNumber = 1.0
    """Prompts of each round: a number, or a share (0.5; all is 1.0). Those that no earlier round had come first."""
    sources: tuple[PromptSource, ...] = ()
    """Prompts for the rounds alone, such as some that the teacher never answered; left out: those of the recipe."""
    samples_per_prompt: Count = 1
    """Answers of the student to each prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature of the answers."""
    top_p: Probability = 1.0
    """Sample from the most probable tokens that reach this mass."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; left out: `generate.max_new_tokens`."""
    own_share: Probability = 0.75
    """Share of the training tokens that are the student's own answers; the rest comes from the recipe's cache."""
    keep: Literal["current", "all"] = "current"
    """Own answers to train on: those of this round, or also those of all earlier ones."""
    teacher: Literal["same", "other"] = "same"
    """same: refuse a teacher that did not score the recipe's cache; other: let another one score the own answers."""
    engine: Literal["vllm", "transformers"] | None = None
    """What lets the student answer; left out: the teacher's engine, and vllm where that is a server."""
    seed: Integer | None = None
    """Seed of the choice of prompts and of the answers; left out: the recipe's."""
    guards: Guards = Guards()
    """Bounds of the answers, beyond which a round is not trained on."""

    def _problems(self) -> Iterator[Problem]:
        yield from unused_sampling(self)
        for i, source in enumerate(self.sources):
            if not source.of_turns:
                yield ("sources", i, "format"), f"rows of format '{source.format}' ask nothing; leave it out"

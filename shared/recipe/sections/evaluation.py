"""What a recipe may say about evaluation: on which rows, which models, on which tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.recipe.base import (
    Count,
    CountOrZero,
    Fraction,
    HomePath,
    Integer,
    NonNegative,
    Probability,
    Problem,
    Section,
    ShareOrNumber,
    Text,
    repeated,
    unused,
    unused_sampling,
)
from shared.text.file_endings import ends_in

COLUMN = re.compile(r"\{(\w+)\}")
"""A column of the file within a `prompt_template`."""
TaskName = Literal["copying", "gsm8k", "humaneval", "keywords", "multiple_choice"]


class Heldout(Section):
    """Prompts that no stage trains on."""

    fraction: Annotated[Fraction, Field(lt=1)] = 0.05
    """Share of prompt groups held out, chosen by a hash of the prompt."""


class Task(Section):
    """One set of questions with a way to score answers."""

    NAMES_THE_RESULT: ClassVar[frozenset[str]] = frozenset(
        ("name", "path", "domain", "limit", "prompt_template", "temperature", "samples", "shots", "seed")
    )
    """Fields that an evaluation's identity has always held; a later one joins it where it is not at its default."""

    name: TaskName
    """How answers are scored: a value copied from the prompt, final number, unit tests, keywords, or the most probable
    choice.
    """
    path: HomePath
    """A jsonl or json file of questions, as the task is published."""
    domain: str = ""
    """Label in reports; left out: the file's name up to its first dot."""
    limit: Count | None = None
    """Take at most this many questions from the start."""
    prompt_template: Text = "{prompt}"
    """Text of the question, with {column} for columns of the file."""
    temperature: NonNegative = 0.0
    """Sampling temperature of answers; 0 takes the most probable token."""
    samples: Count = 1
    """Answers per question; the score is their mean."""
    shots: CountOrZero = 0
    """Solved examples put before each question."""
    seed: Integer = 0
    """Seed of sampled answers."""

    @model_validator(mode="before")
    @classmethod
    def _domain_from_path(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("domain") in (None, "") and isinstance(data.get("path"), str):
            return {**data, "domain": PurePath(data["path"]).name.split(".")[0]}
        return data

    def _problems(self) -> Iterator[Problem]:
        if not COLUMN.search(self.prompt_template):
            yield ("prompt_template",), "names no {column}, so that every question would be the same; write {prompt}"
        if self.name != "multiple_choice":
            yield from unused_sampling(self)
            return
        why = "multiple_choice compares likelihoods and samples no answer; leave it out"
        yield from unused(self, ("temperature", "samples", "seed"), why)


class SideBySide(Section):
    """Every model's sampled answers to the same prompts, compared with the teacher's and with the student's before."""

    size: Literal["quick", "medium", "full"] = "quick"
    """quick: 10 prompts, evenly from every source; medium: 50 at random; full: 350 at random. Fewer where there are no
    more.
    """
    temperatures: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0.1, 0.7, 1.2)
    """Sampling temperatures; every prompt is answered once at each."""
    seed: Integer = 0
    """Seed of the choice of prompts and of the answers."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; left out: `evaluate.max_new_tokens`."""
    prompts: Annotated[tuple[HomePath, ...], Field(min_length=1)] = ("heldout",)
    """Where prompts come from: heldout (the cache's held-out rows), tasks (the tasks' questions), jsonl files with a
    `prompt`.
    """

    def _problems(self) -> Iterator[Problem]:
        for name in ("temperatures", "prompts"):
            values = getattr(self, name)
            for i in repeated(values):
                yield (name, i), f"{values[i]} is listed twice"
        for i, place in enumerate(self.prompts):
            if place not in ("heldout", "tasks") and not ends_in(place, ".jsonl", ".jsonl.gz"):
                yield ("prompts", i), f"'{place}' is neither 'heldout' nor 'tasks' nor a .jsonl file"


class OwnAnswers(Section):
    """Every model answers held-out prompts itself, the teacher scores the answers, and the model is compared there."""

    prompts: ShareOrNumber = 1.0
    """Held-out prompts to answer: a number, or a share (0.5; all is 1.0)."""
    temperature: NonNegative = 1.0
    """Sampling temperature of the answers."""
    top_p: Probability = 1.0
    """Sample from the most probable tokens that reach this mass."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; left out: `generate.max_new_tokens`."""
    seed: Integer = 0
    """Seed of the choice of prompts and of the answers."""

    def _problems(self) -> list[Problem]:
        return unused_sampling(self)


class Evaluate(Section):
    """Which models are compared, and how."""

    models: tuple[Text, ...] = ()
    """teacher, base, and names of stages."""
    tasks: tuple[Task, ...] = ()
    """Sets of questions, for every model."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What answers the questions."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    heldout_rows: Count | None = None
    """Held-out rows to measure on, at most; left out: all."""
    side_by_side: SideBySide | None = None
    """Sampled answers of every model beside each other; left out: none."""
    own_answers: OwnAnswers | None = None
    """KL to the teacher on each model's own answers to held-out prompts, `heldout.own`; left out: none."""
    cost: bool = False
    """Measure parameters, memory, time to first token and tokens per second of every model, all in one run."""

    def _problems(self) -> Iterator[Problem]:
        for i in repeated(self.models):
            yield ("models", i), f"'{self.models[i]}' is listed twice"
        if self.side_by_side is not None and "tasks" in self.side_by_side.prompts and not self.tasks:
            yield ("side_by_side", "prompts"), "there are no `tasks` whose questions could be asked; add some"
        domains = [task.domain for task in self.tasks]
        for i in repeated(domains):
            yield ("tasks", i, "domain"), f"another task has the domain '{domains[i]}'; give each its own"

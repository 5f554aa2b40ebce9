"""Questions of a task: read from its file, rendered into a conversation, given to a scorer.

Which columns a row needs is the task's own business. With `shots`, the first rows of the file become solved examples
before each question and are not asked themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared.errors import EvaluationError
from shared.recipe.recipe import Task
from tools.evaluate.tasks.question_files import read_rows


@dataclass(frozen=True, slots=True)
class Question:
    """One question and what its answer is checked against."""

    place: str
    """path:line"""
    prompt: str
    reference: str
    """A correct answer, as a reader wants to see it beside a model's."""
    row: Mapping[str, Any]
    """All columns of the file."""
    shots: tuple[tuple[str, str], ...] = ()
    """Solved examples (prompt, answer) that come before."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer is worth."""

    value: float
    """0 to 1."""
    reason: str = ""
    """Why not 1, in a few words."""


Scorer = Callable[[Sequence[tuple[Question, str]]], list[Score]]
"""Score (question, answer) pairs, in their order."""


class TaskKind(Protocol):
    """One way to ask and to score; the modules of this package named after a task have this shape."""

    METRIC: str
    """What a score is, in words for a table's foot."""

    def read_row(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return prompt and reference of a row; ValueError with the reason where it does not fit."""
        ...

    def score_answers(self, pairs: Sequence[tuple[Question, str]], allow_unsafe_code: bool = False) -> list[Score]:
        """Score every answer."""
        ...


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A model's score on one task, over its questions."""

    score: float
    """Mean over questions of the mean over samples, 0 to 1."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    num_questions: int
    extra: dict[str, float] = field(default_factory=dict)
    """More of the same task, such as pass@10."""


def read_questions(task: Task, kind: TaskKind) -> list[Question]:
    """Read a task's questions in the order of its file.

    Raises:
        EvaluationError: the file cannot be read, or a row (path:line) does not have the task's shape.
    """
    wanted = None if task.limit is None else task.limit + task.shots
    found: list[Question] = []
    for place, row in read_rows(Path(task.path)):
        if wanted is not None and len(found) >= wanted:
            break
        try:
            prompt, reference = kind.read_row(row)
            found.append(Question(place, fill(task.prompt_template, {**row, "prompt": prompt}), reference, row))
        except ValueError as error:
            raise EvaluationError(f"{place}: not a row of the task '{task.name}': {error}") from error
    shots = tuple((question.prompt, question.reference) for question in found[: task.shots])
    asked = found[task.shots :]
    if not asked:
        raise EvaluationError(
            f"{task.path}: {len(found)} rows and {task.shots} shots leave no question for the task '{task.name}'; "
            "add rows"
        )
    return [Question(q.place, q.prompt, q.reference, q.row, shots) for q in asked]


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """Put columns into a template's {names}; a name that is no column raises ValueError.

    >>> fill("Q: {prompt}", {"prompt": "1 + {x}?"})
    'Q: 1 + {x}?'
    """

    def column(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in columns:
            raise ValueError(f"prompt_template names the column '{name}', the row has {sorted(columns)}")
        return str(columns[name])

    return re.sub(r"\{(\w+)\}", column, template)


def text_column(row: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    """Return a row's text column; ValueError where it is missing, no text, or empty."""
    value = row.get(name)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        found = "is missing" if name not in row else f"is {value!r:.60}"
        raise ValueError(f"the column '{name}' {found}, expected text")
    return value

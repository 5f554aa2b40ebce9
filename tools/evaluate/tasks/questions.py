"""Questions of a task: read from its file, rendered into a conversation, given to a scorer.

Which columns a row needs is the task's own business. With `shots`, the first rows of the file become solved examples
before each question and are not asked themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from shared.recipe.recipe import Task
from shared.recipe.sections.evaluation import COLUMN
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


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a question, as a model sees it."""

    text: str
    logprob_nats: float
    """Natural log of its probability after the prompt, summed over its tokens."""
    num_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Log-probability over tokens."""
        return self.logprob_nats / self.num_tokens

    @property
    def nats_per_byte(self) -> float:
        """Log-probability over UTF-8 bytes of the text."""
        return self.logprob_nats / len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, what its answers are worth, and the choices that were weighed for it."""

    question: Question
    scores: Sequence[Score]
    choices: Sequence[Choice] = ()


@dataclass(frozen=True, slots=True)
class TaskKind:
    """One way to ask and to score: `TASK` of a module of this package that is named after it."""

    metric: str
    """What a score is, in words for a table's foot."""
    read_row: Callable[[Mapping[str, Any]], tuple[str, str]]
    """Prompt and reference of a row; ValueError with the reason where it does not fit."""
    score_answers: Callable[..., list[Score]]
    """Of (question, answer) pairs, and whether code may run without a sandbox: what each answer is worth."""
    choices_of: Callable[[Mapping[str, Any]], list[str]] | None = None
    """The choices of a row, which are weighed by likelihood; None: an answer is generated."""
    runs_code: bool = False
    """Whether answers are run in the sandbox."""
    more_figures: Callable[[Sequence[Asked]], dict[str, float]] = lambda asked: {}
    """More figures of the same task."""


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

    return COLUMN.sub(column, template)


def one_by_one(score: Callable[[Question, str], Score]) -> Callable[..., list[Score]]:
    """Return a scorer of (question, answer) pairs that runs no code, from that of one pair."""

    def score_answers(pairs: Sequence[tuple[Question, str]], allow_unsafe_code: bool = False) -> list[Score]:
        return [score(question, answer) for question, answer in pairs]

    return score_answers


def texts_column(row: Mapping[str, Any], name: str, fewest: int = 1) -> list[str]:
    """Return a row's column of texts; ValueError where it is no list, has fewer, or one of them is no text or empty."""
    value = row.get(name)
    if not isinstance(value, list) or len(value) < fewest or not all(isinstance(v, str) and v.strip() for v in value):
        many = "at least two texts" if fewest > 1 else "texts"
        raise ValueError(f"the column '{name}' is {value!r:.60}, expected a list of {many}")
    return value


def text_column(row: Mapping[str, Any], name: str) -> str:
    """Return a row's text column; ValueError where it is missing, no text, or empty."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if name not in row else f"is {value!r:.60}"
        raise ValueError(f"the column '{name}' {found}, expected text")
    return value

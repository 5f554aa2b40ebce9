"""The tasks that a recipe can name, and how a model's answers become one score with its interval.

A question's score is the mean over its samples, a task's the mean over its questions. The 95 % interval is Wilson's
with the number of questions: it stays inside 0 to 1 and is not empty at either end; for scores between 0 and 1 it is a
little too wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from statistics import fmean

from shared.recipe.recipe import Task
from tools.evaluate.tasks.questions import Asked, Choice, Question, Score, TaskKind, TaskScore

_Z95 = 1.959964


def task_kind(task: Task) -> TaskKind:
    """Return what asks and scores a task."""
    kind: TaskKind = import_module(f"{__package__}.{task.name}").TASK
    return kind


def aggregate(
    task: Task, questions: Sequence[Question], scores: Sequence[Score], choices: Sequence[Sequence[Choice]] = ()
) -> TaskScore:
    """Average scores, `task.samples` for each question in turn; `choices` likewise, where choices were weighed."""
    n = task.samples
    assert len(scores) == len(questions) * n
    asked = [Asked(q, scores[i * n : i * n + n], choices[i * n] if choices else ()) for i, q in enumerate(questions)]
    score = fmean(fmean(score.value for score in question.scores) for question in asked)
    low, high = wilson_interval(score, len(asked))
    return TaskScore(score, low, high, len(questions), task_kind(task).more_figures(asked))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count`. Wilson (1927), J. Am. Stat. Assoc. 22.

    >>> [round(end, 3) for end in wilson_interval(0.0, 100)]
    [0.0, 0.037]
    """
    z2 = _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)

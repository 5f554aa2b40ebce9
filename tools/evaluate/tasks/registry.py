"""The tasks that a recipe can name, and how a model's answers become one score with its interval.

A question's score is the mean over its samples, a task's the mean over its questions. The 95 % interval is Wilson's
with the number of questions: it stays inside 0 to 1 and is not empty at either end; for scores between 0 and 1 it is a
little too wide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

from shared.recipe.recipe import Task
from tools.evaluate.tasks import gsm8k, humaneval, keywords, multiple_choice
from tools.evaluate.tasks.questions import Question, Score, TaskKind, TaskScore

_KINDS: dict[str, TaskKind] = {
    "gsm8k": cast("TaskKind", gsm8k),
    "humaneval": cast("TaskKind", humaneval),
    "keywords": cast("TaskKind", keywords),
    "multiple_choice": cast("TaskKind", multiple_choice),
}

_Z95 = 1.959964


def task_kind(task: Task) -> TaskKind:
    """Return what asks and scores a task."""
    return _KINDS[task.name]


def aggregate(task: Task, questions: Sequence[Question], scores: Sequence[Score]) -> TaskScore:
    """Average scores that come question by question, `task.samples` each."""
    assert len(scores) == len(questions) * task.samples
    means = [_mean([score.value for score in group]) for group in _groups(scores, task.samples)]
    low, high = wilson_interval(_mean(means), len(means))
    extra: dict[str, float] = {}
    if task.name == "humaneval" and task.samples > 1:
        k = task.samples
        correct = [sum(score.value == 1.0 for score in group) for group in _groups(scores, k)]
        extra[f"pass@{k}"] = _mean([humaneval.pass_at_k(k, num, k) for num in correct])
    return TaskScore(_mean(means), low, high, len(questions), extra)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count`. Wilson (1927), J. Am. Stat. Assoc. 22.

    >>> [round(end, 3) for end in wilson_interval(0.0, 100)]
    [0.0, 0.037]
    """
    z2 = _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _groups(scores: Sequence[Score], size: int) -> list[list[Score]]:
    groups: dict[int, list[Score]] = defaultdict(list)
    for index, score in enumerate(scores):
        groups[index // size].append(score)
    return list(groups.values())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

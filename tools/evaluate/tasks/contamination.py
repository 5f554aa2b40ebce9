"""How many of a task's questions are also among the prompts of a run: scores on those say little about others.

A question counts when a prompt asks it, too, letter for letter but for white space, whatever the answer, bare or in the
task's `prompt_template`. Held-out prompts are counted apart: no stage trains on them. Cost: one hash per question.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import get_args

from shared.cache.cache import Cache
from shared.cache.groups import GroupRule, question_key, questions_among
from shared.errors import EvaluationError
from shared.keys import is_heldout
from shared.recipe.recipe import Recipe, Task
from tools.evaluate.tasks.questions import read_questions
from tools.evaluate.tasks.registry import task_kind


def among_caches(recipe: Recipe, task: Task, caches: Sequence[Cache]) -> dict[str, int]:
    """Return `questions`, and how many of them are among the caches' rows: `trained_on`, and `heldout` for the others.

    Raises:
        EvaluationError: the task's file cannot be read.
    """
    forms = _forms(task)
    found = [questions_among([form[which] for form in forms], caches) for which in (0, 1)]
    rule = caches[0].sequences_identity.groups if caches else "first question"
    keys = [[question_key(text, rule) for text in form] for form in forms]
    there = [{keys[i][which] for which in (0, 1) if found[which][i]} for i in range(len(forms))]
    return _counts(there, recipe.heldout.fraction)


def among_groups(recipe: Recipe, task: Task, groups: Collection[bytes]) -> dict[str, int]:
    """Return the same counts against the group keys of rows that are still to be made.

    Raises:
        EvaluationError: the task's file cannot be read.
    """
    rules = get_args(GroupRule)
    keys = [{question_key(text, rule) for text in form for rule in rules} for form in _forms(task)]
    return _counts([{key for key in of if key in groups} for of in keys], recipe.heldout.fraction)


def by_task(recipe: Recipe, count: Callable[[Task], dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return domain -> counts, of the tasks whose file is here; `decant eval` says what is wrong with one."""
    found = {}
    for task in recipe.evaluate.tasks:
        with contextlib.suppress(EvaluationError):
            found[task.domain] = count(task)
    return found


def sentence(domain: str, counts: dict[str, int]) -> str:
    """Return the counts in words, empty where no question is among the prompts."""
    among = counts["trained_on"] + counts["heldout"]
    if not among:
        return ""
    held = f" ({counts['heldout']} of them held out)" if counts["heldout"] else ""
    return f"{domain}: {among} of {counts['questions']} questions are also among the prompts{held}"


def _forms(task: Task) -> list[tuple[str, str]]:
    """Return each question as its file has it, and as it is asked."""
    kind = task_kind(task)
    return [(kind.read_row(question.row)[0], question.prompt) for question in read_questions(task, kind)]


def _counts(there: Sequence[set[bytes]], fraction: float) -> dict[str, int]:
    trained = sum(any(not is_heldout(key, fraction) for key in keys) for keys in there)
    return {"questions": len(there), "trained_on": trained, "heldout": sum(map(bool, there)) - trained}

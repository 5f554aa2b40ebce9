"""What is known to be wrong with a recipe before any work: one table of checks, for plan, teach, train and run.

Each check yields places of the recipe and sentences; all of them are reported at once, with file and line. A check that
needs an earlier one to hold says nothing where that one spoke. A command that only plans may do without models and data
whose sizes the recipe states under `assume`, and without the packages of the machine that will train.
Cost: small files, the tasks' questions, and tokenizers where their files alone do not say that they are the same; where
    nothing is wrong so far, the headers of the models' weights too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from shared.cache.layout import refuse_within_cache
from shared.cache.sync.mirror import bring_if_remote
from shared.errors import refused
from shared.recipe.base import Problem
from shared.recipe.file import Where, listed
from shared.recipe.recipe import Recipe
from tools.plan.preflight.preflight_asked import Asked, said
from tools.plan.preflight.preflight_evaluate import evaluation_problems, unmeasured_problems
from tools.plan.preflight.preflight_machine import machine_problems
from tools.plan.preflight.preflight_rounds import answer_problems, score_problems
from tools.plan.preflight.preflight_sampling import sampling_problems
from tools.plan.preflight.preflight_stages import stage_problems
from tools.plan.preflight.preflight_student import student_problems
from tools.plan.preflight.preflight_teach import prompt_problems, teacher_problems
from tools.plan.preflight.preflight_weights import (
    cache_problems,
    training_problems,
    weight_problems,
    window_problems,
)


def preflight(recipe: Recipe, where: Where, phases: Collection[str], *, plans_only: bool) -> None:
    """Refuse a recipe of which `phases` could not run.

    Args:
        recipe: the recipe.
        where: where its values were written.
        phases: of teach, train, eval and report, those that will run; of the steps of rounds, answer and score too.
        plans_only: whether it is only planned, perhaps on another machine.

    Raises:
        RecipeError: with a line for each problem: `file:line: path: what was found, what was expected, what to do`.
    """
    asked = Asked(recipe, frozenset(phases), plans_only)
    for checks in (CHECKS, CHECKS_OF_WEIGHTS):
        problems = dict[tuple[str | int, ...], str]()
        for needed, check in checks:
            if needed in ("any", *phases):
                for place, sentence in check(asked):
                    problems.setdefault(place, sentence)
        if problems:
            raise listed(problems.items(), where)


def _records(asked: Asked) -> Iterator[Problem]:
    """Fetch the records of caches that are named by a URL."""
    for i, path in enumerate(asked.recipe.cache):
        yield from said(("cache", i), partial(bring_if_remote, path))


def _places(asked: Asked) -> Iterator[Problem]:
    """Check that directories can be written to."""
    places: list[tuple[tuple[str | int, ...], Path]] = [(("output_dir",), asked.recipe.output_dir)]
    places += [(("cache", i), path) for i, path in enumerate(asked.recipe.cache)]
    for place, path in places:
        try:
            there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        except OSError as error:
            yield place, f"'{str(path)[:60]}' cannot be a directory: {refused(error)}"
            continue
        if not there.is_dir():
            yield place, f"'{there}' is a file where a directory is expected; remove it or name another"
        elif not os.access(there, os.W_OK) and (place[0] != "cache" or asked.builds):
            yield place, f"'{there}' cannot be written to; correct its permissions or name another"
        elif place[0] == "cache" and path.is_dir() and not (path / "cache.json").exists() and any(path.iterdir()):
            yield place, f"'{path}' holds files and is no cache (it has no cache.json); name another directory"
        elif place[0] == "cache" and not (path / "cache.json").exists():
            yield from said(place, partial(refuse_within_cache, path))
        elif place[0] == "output_dir":
            yield from said(place, partial(refuse_within_cache, path / "recipe.yaml", asked.recipe.cache))


CHECKS: tuple[tuple[str, Callable[[Asked], Iterator[Problem]]], ...] = (
    ("any", _records),
    ("any", _places),
    ("teach", teacher_problems),
    ("teach", prompt_problems),
    ("train", student_problems),
    ("train", stage_problems),
    ("train", machine_problems),
    ("answer", answer_problems),
    ("score", score_problems),
    ("eval", evaluation_problems),
    ("any", unmeasured_problems),
    ("any", sampling_problems),
)
"""Which phase needs which check."""
CHECKS_OF_WEIGHTS: tuple[tuple[str, Callable[[Asked], Iterator[Problem]]], ...] = (
    ("any", weight_problems),
    ("train", training_problems),
    ("train", window_problems),
    ("teach", cache_problems),
)
"""Those that read the headers of weights, once nothing else is wrong."""

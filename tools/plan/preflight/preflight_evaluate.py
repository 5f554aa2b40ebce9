"""What is known to be wrong with the evaluation before any work: models, tasks and prompts side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.recipe.base import Problem
from tools.evaluate.own.own_answers import asked_of_models
from tools.plan.preflight.preflight_asked import Asked, Place, said, said_of_prompts
from tools.plan.preflight.preflight_models import model_problem

MEASURED = ("tasks", "side_by_side", "own_answers", "cost")
"""What a recipe asks of the models that are compared."""


def _models(asked: Asked) -> Iterator[Problem]:
    """Check that the models are there, those of stages where nothing trains them before."""
    recipe = asked.recipe
    teacher, student, assume = recipe.teacher, recipe.student, recipe.assume
    weights = not asked.plans_only
    for i, name in enumerate(recipe.evaluate.models):
        problem: str | None = None
        place: Place = ("evaluate", "models", i)
        if name == "teacher" and teacher is not None:
            stated = asked.plans_only and (assume.teacher is not None or bool(assume.sources))
            place = ("teacher", "model")
            problem = model_problem(teacher.model, teacher.revision, weights=weights, stated=stated)
        elif name in recipe.teachers:
            other = recipe.teachers[name]
            place = ("teachers", name, "model")
            problem = model_problem(other.model, other.revision, weights=weights, stated=asked.elsewhere)
        elif name == "base" and student is not None and student.init == "random":
            problem = (
                "the student starts from random weights (init: random), so there is nothing to compare; leave it out"
            )
        elif name == "base" and student is not None:
            stated = asked.plans_only and assume.student is not None
            place = ("student", "model")
            problem = model_problem(student.model, student.revision, weights=weights, stated=stated)
        elif name not in ("teacher", "base") and "train" not in asked.phases:
            directory = recipe.stage_dir(name) / "model"
            if not directory.is_dir():
                problem = f"'{name}' has no model at {directory}; run `decant train` first, or leave it out"
        if problem is not None:
            yield place, problem


def unmeasured_problems(asked: Asked) -> Iterator[Problem]:
    """Name what is to be measured of no model."""
    evaluate = asked.recipe.evaluate
    given = [name for name in MEASURED if name in evaluate.model_fields_set and getattr(evaluate, name)]
    if given and not evaluate.models:
        names = " and ".join(f"`{name}`" for name in given)
        sentence = "there is no model to measure; list some of teacher, base and the stages' names in `evaluate.models`"
        yield ("evaluate", given[0]), f"{sentence}, or leave {names} out"


def evaluation_problems(asked: Asked) -> Iterator[Problem]:
    """Check models, tasks and prompts of the comparison."""
    from tools.evaluate.side_by_side.side_prompts import read_prompt_rows
    from tools.plan.preflight.preflight_questions import require_questions

    recipe = asked.recipe
    yield from _models(asked)
    if asked.elsewhere:
        return
    for i, task in enumerate(recipe.evaluate.tasks):
        yield from said(("evaluate", "tasks", i, "path"), partial(require_questions, recipe, task))
    if recipe.evaluate.own_answers is not None:
        place = ("evaluate", "own_answers", "prompts")
        yield from said_of_prompts(place, recipe.prompts, ("prompts",), *asked_of_models(recipe))
    for i, name in enumerate(recipe.evaluate.side_by_side.prompts if recipe.evaluate.side_by_side else ()):
        at: Place = ("evaluate", "side_by_side", "prompts", i)
        if name not in ("heldout", "tasks") and not Path(name).is_file():
            yield at, f"there is no file '{name}'; correct the path"
        elif name not in ("heldout", "tasks"):
            yield from said(at, partial(deque, read_prompt_rows(Path(name)), 0))

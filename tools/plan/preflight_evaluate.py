"""What is known to be wrong with the evaluation before any work: models, tasks and prompts side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.recipe.base import Problem
from tools.plan.preflight_asked import Asked, said


def evaluation_problems(asked: Asked) -> Iterator[Problem]:
    """Check models, tasks and prompts of the comparison."""
    from tools.evaluate.questions import read_questions
    from tools.evaluate.tasks import task_kind

    recipe = asked.recipe
    for i, model in enumerate(recipe.evaluate.models):
        if model == "base" and recipe.student is not None and recipe.student.init == "random":
            sentence = (
                "the student starts from random weights (init: random), so there is nothing to compare; leave it out"
            )
            yield ("evaluate", "models", i), sentence
    if asked.elsewhere:
        return
    for i, task in enumerate(recipe.evaluate.tasks):
        yield from said(
            ("evaluate", "tasks", i, "path"),
            lambda task=task: read_questions(task, task_kind(task)),  # type: ignore[misc]
        )
    for i, name in enumerate(recipe.evaluate.side_by_side.prompts if recipe.evaluate.side_by_side else ()):
        if name not in ("heldout", "tasks") and not Path(name).is_file():
            yield ("evaluate", "side_by_side", "prompts", i), f"there is no file '{name}'; correct the path"

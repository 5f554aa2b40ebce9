"""A recipe's stages, one after another. Cost: the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.errors import UsageError
from shared.progress import Progress
from shared.recipe.recipe import Recipe, Stage
from student_train.records.progress import OpenProgress
from student_train.stage.stage_run import run_stage


def run_stages(
    recipe: Recipe,
    from_stage: str | None = None,
    to_stage: str | None = None,
    *,
    open_progress: OpenProgress = Progress,
) -> list[Path]:
    """Train a recipe's stages, from one to another or all, and return the directories of their models.

    A finished stage is reused, a killed one continues from its newest complete checkpoint.

    Raises:
        UsageError: a stage is not in the recipe.
        TrainingError: a stage cannot start, does not match what is there, or its loss is not finite.
        CacheError: a cache cannot be opened, or is of another tokenizer than the student.
    """
    return [run_stage(recipe, stage, open_progress) for stage in chosen_stages(recipe, from_stage, to_stage)]


def chosen_stages(recipe: Recipe, from_stage: str | None, to_stage: str | None) -> Sequence[Stage]:
    """Return the stages between two names, both included."""
    names = [stage.name for stage in recipe.stages]
    if recipe.student is None or not names:
        raise UsageError("the recipe has no student or no stages, so there is nothing to train; add them")
    for name in (from_stage, to_stage):
        if name is not None and name not in names:
            raise UsageError(f"stage '{name}' is not in the recipe, which has {', '.join(names)}; correct its name")
    first = names.index(from_stage) if from_stage else 0
    last = names.index(to_stage) if to_stage else len(names) - 1
    if first > last:
        raise UsageError(f"stage '{from_stage}' comes after stage '{to_stage}'; swap --from-stage and --to-stage")
    return recipe.stages[first : last + 1]

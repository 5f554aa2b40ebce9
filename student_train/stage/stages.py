"""A recipe's stages, one after another. Cost: the training."""

from __future__ import annotations

from pathlib import Path

from shared.recipe.recipe import Recipe
from student_train.stage.stage_run import run_stage


def run_stages(recipe: Recipe, from_stage: str | None = None, to_stage: str | None = None) -> list[Path]:
    """Train a recipe's stages, from one to another or all, and return the directories of their models.

    A finished stage is reused, a killed one continues from its newest complete checkpoint.

    Raises:
        UsageError: a stage is not in the recipe.
        TrainingError: a stage cannot start, does not match what is there, or its loss is not finite.
        CacheError: a cache cannot be opened, or is of another tokenizer than the student.
    """
    return [run_stage(recipe, stage) for stage in recipe.stages_between(from_stage, to_stage)]

"""The phases of a recipe as functions: what `decant teach`, `train`, `eval` and `report` do, with results as values.

Each takes a recipe, or the path of one, continues what is there, and loads what it needs when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe


def _loaded(recipe: Recipe | Path | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def teach(recipe: Recipe | Path | str) -> dict[str, Any]:
    """Build or continue the recipe's cache and return its summary: rows generated, scored and reused, seconds.

    Raises:
        DecantError: the build cannot start or cannot go on.
    """
    from tools.phases import teach as run

    summary: dict[str, Any] = run(_loaded(recipe), None)[0]
    return summary


def train(recipe: Recipe | Path | str) -> dict[str, Path]:
    """Train the recipe's stages, or reuse them, and return the directory of each model by the stage's name.

    Raises:
        DecantError: training cannot start or must stop.
    """
    from tools.phases import train as run

    return {name: Path(path) for name, path in run(_loaded(recipe), None, None)[0]["models"].items()}


def evaluate(recipe: Recipe | Path | str) -> dict[str, Any]:
    """Evaluate every model of the recipe side by side and return the figures by model.

    Raises:
        EvaluationError: a model or a task cannot be evaluated.
    """
    from tools.phases import evaluate as run

    figures: dict[str, Any] = run(_loaded(recipe), allow_unsafe_code=False)[0]
    return figures


def report(*runs: Path | str) -> dict[str, Any]:
    """Write the report of one run or several into the first one's directory and return its figures (report.json).

    Raises:
        EvaluationError: a run has nothing to report.
    """
    from tools.phases import report as run

    figures: dict[str, Any] = run([Path(path) for path in runs])[0]
    return figures

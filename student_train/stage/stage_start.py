"""Which model directory a stage starts from: the student's own weights, another stage of the recipe, or anything on
disk.

On disk: a model directory, the directory of another run's stage, `RUN:STAGE`, or a run that has one stage. Cost:
nothing.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import TrainingError
from shared.recipe.recipe import Recipe, Stage


def start_directory(recipe: Recipe, stage: Stage) -> Path | None:
    """Return the model directory that a stage starts from, or None for the student's own weights.

    Raises:
        TrainingError: that stage has not been trained, or the directory holds no model.
    """
    start = stage.init_from
    if start == "base":
        return None
    names = [other.name for other in recipe.stages]
    if start == "previous":
        start = names[names.index(stage.name) - 1]
    if start in names:
        directory = recipe.stage_dir(start) / "model"
        if not directory.is_dir():
            raise TrainingError(
                f"stage '{stage.name}' starts from stage '{start}', which has no model in {directory}; train that "
                "one first"
            )
    else:
        directory = model_directory(stage.name, start)
    if not (directory / "config.json").is_file():
        raise TrainingError(
            f"stage '{stage.name}' starts from {directory}, which holds no config.json; name the directory of a model"
        )
    return directory


def model_directory(stage: str, start: str) -> Path:
    """Return the model directory that `start`, a place on disk, means for the stage of that name.

    Raises:
        TrainingError: it names a run without saying which of its stages, or a stage that the run has not finished.
    """
    place = Path(start)
    if not place.is_dir() and ":" in start:
        run, _, other = start.rpartition(":")
        return _of_run(stage, Path(run), other)
    if (place / "config.json").is_file():
        return place
    if (place / "model" / "config.json").is_file():
        return place / "model"
    return _of_run(stage, place, None) if (place / "train").is_dir() else place


def _of_run(stage: str, run: Path, wanted: str | None) -> Path:
    finished = sorted(config.parent.parent.name for config in run.glob("train/*/model/config.json"))
    chosen = [name for name in finished if wanted in (None, name)]
    if len(chosen) != 1:
        listed = ", ".join(finished) or "none"
        problem = f"has no finished stage '{wanted}'" if wanted else "does not say which of its stages"
        raise TrainingError(
            f"stage '{stage}' starts from the run {run}, which {problem} (finished: {listed}); name one as {run}:STAGE"
        )
    return run / "train" / chosen[0] / "model"

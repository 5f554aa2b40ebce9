"""Is there room on the disk for what a stage will write? Asked before the first step instead of failing at the last
checkpoint.

A checkpoint holds what is trained and the optimizer's state of it; while one is written, those that are kept exist
beside it. Then comes the final model, with the adapter where there is one. What earlier checkpoints of the stage take
is counted as there.
Cost: a look at the directory.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from shared.errors import TrainingError
from shared.recipe.recipe import Stage
from shared.recipe.sections.optimizers import OPTIMIZERS

_OTHER_BYTES = 1 << 20
"""Random states, configs, logs."""


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def bytes_needed(model: Any, stage: Stage, num_steps: int, *, adapted: bool) -> tuple[int, int, int]:
    """Return (checkpoints at once, bytes of one, bytes of the final model) of a stage.

    Args:
        model: the student that trains, whole or in shards.
        stage: the recipe's.
        num_steps: optimizer steps of the stage.
        adapted: whether checkpoints hold an adapter alone.
    """
    saved = {id(parameter): parameter for parameter in model.parameters()}.values()
    trained = [parameter for parameter in saved if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in (trained if adapted else saved))
    least = 4 if stage.trainer.rounding == "stochastic" else 0  # its state is float32 also of narrower weights
    state = sum(
        parameter.numel() * OPTIMIZERS[stage.trainer.optim].state_bytes(max(parameter.element_size(), least))
        for parameter in trained
    )
    keep = stage.trainer.save_total_limit
    num_checkpoints = math.ceil(num_steps / stage.trainer.save_steps)
    if keep is not None:
        num_checkpoints = min(num_checkpoints, keep + 1)
    final = sum(parameter.numel() * parameter.element_size() for parameter in saved) + _OTHER_BYTES
    return num_checkpoints, int(weights + state) + _OTHER_BYTES, final


def check_disk_space(model: Any, stage: Stage, num_steps: int, directory: Path, *, adapted: bool) -> None:
    """Refuse to train where the disk cannot hold the result.

    Raises:
        TrainingError: with what is needed and what is free.
    """
    num_checkpoints, checkpoint, final = bytes_needed(model, stage, num_steps, adapted=adapted)
    there = sum(path.stat().st_size for path in directory.glob("checkpoint-*/*") if path.is_file())
    needed, free = num_checkpoints * checkpoint + final - there, free_bytes(directory)
    if needed > free:
        raise TrainingError(
            f"stage '{stage.name}' needs {_size(needed)} in {directory} ({num_checkpoints} checkpoints of "
            f"{_size(checkpoint)} and the model of {_size(final)}), {_size(free)} are free; make room, lower "
            "trainer.save_total_limit, or set output_dir to a larger disk"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"

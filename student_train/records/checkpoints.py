"""Which checkpoints exist: those with a marker, written last.

A checkpoint is a directory of many files; killed half-way through, it looks like one. So the marker `complete.json` is
written after everything else is on disk, and it is removed first when the checkpoint is: a directory without it is no
checkpoint, is removed on resume, and the one before is taken. The marker also says which plan and caches the checkpoint
belongs to.
Cost: one fsync per file of the checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.atomic import fsync_dir, write_atomic
from shared.errors import TrainingError
from shared.failpoints import failpoint

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps done."""
    belongs_to: Mapping[str, str]
    """What it was made with: `plan`, `cache`."""


def complete_checkpoint(path: Path, belongs_to: Mapping[str, str]) -> None:
    """Make a written checkpoint durable and mark it complete."""
    fsync_tree(path)
    failpoint("checkpoint.before_marker")
    write_atomic(path / MARKER, json.dumps(dict(belongs_to), indent=1).encode(), what="checkpoint")
    failpoint("checkpoint.after_marker")


def fsync_tree(path: Path) -> None:
    """Make every file below a directory durable, and the directory's own name."""
    for directory, _, files in os.walk(path):
        for name in files:
            with (Path(directory) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_dir(Path(directory))
    fsync_dir(path.parent)


def list_checkpoints(stage_dir: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a stage, oldest first."""
    found = []
    for path, step in _directories(stage_dir):
        if (path / MARKER).is_file():
            found.append(Checkpoint(path, step, json.loads((path / MARKER).read_text())))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_incomplete(stage_dir: Path) -> list[Path]:
    """Remove what a killed run left of unfinished checkpoints and exports; return their paths."""
    paths = [path for path, _ in _directories(stage_dir) if not (path / MARKER).is_file()]
    paths += [path for path in stage_dir.glob(".*.partial") if path.is_dir()]
    for path in paths:
        shutil.rmtree(path)
    return paths


def rotate_checkpoints(stage_dir: Path, keep: int | None, also: int | None = None) -> None:
    """Remove the oldest complete checkpoints until `keep` are left, and the one of step `also`; None keeps all."""
    if keep is None:
        return
    for checkpoint in list_checkpoints(stage_dir)[:-keep]:
        if checkpoint.step == also:
            continue
        (checkpoint.path / MARKER).unlink()
        shutil.rmtree(checkpoint.path)


def newest_checkpoint(stage_dir: Path, belongs_to: Mapping[str, str]) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None.

    Raises:
        TrainingError: it was made with another plan or other caches.
    """
    checkpoints = list_checkpoints(stage_dir)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    for name, wanted in belongs_to.items():
        found = newest.belongs_to.get(name)
        if found != wanted:
            raise TrainingError(
                f"{newest.path} was made with {name} {found} where this run has {name} {wanted}, so it cannot be "
                "continued; "
                f"remove or rename {stage_dir} to train the stage again, or go back to what it was made with"
            )
    return newest


def _directories(stage_dir: Path) -> list[tuple[Path, int]]:
    if not stage_dir.is_dir():
        return []
    matches = ((path, _NAME.fullmatch(path.name)) for path in stage_dir.iterdir() if path.is_dir())
    return [(path, int(match[1])) for path, match in matches if match]

"""Which checkpoints exist: those with a marker, written last, whose files are still what the marker says.

A checkpoint is a directory of many files; killed half-way through, it looks like one. So the marker `complete.json` is
written after everything else is on disk, and it is removed first when the checkpoint is: a directory without it is no
checkpoint, is removed on resume, and the one before is taken. The marker also says which plan and caches the checkpoint
belongs to,
and holds size and checksum of every file and a checksum of itself. Before a stage goes on, they are compared: a
checkpoint that was altered, got files or was given another step's name is put aside by name and an older one is taken.
Markers of earlier versions hold no checksums; of their files is told what their own formats tell.
Cost: one fsync per file and one reading of the checkpoint, when it is written and when it is continued; about a second
    per GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from shared.atomic import fsync_dir, write_atomic
from shared.errors import TrainingError, reason_of, refused
from shared.keys import canonical_json
from shared.process.failpoints import failpoint
from shared.text import strict_json
from student_train.records.kept_json import MAX_BYTES

MARKER = "complete.json"
STATE_FILE = "trainer_state.json"
SETTINGS = "settings"
"""What a marker calls the identity of its stage; earlier versions did not write it."""
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = "damaged-"
_FILES, _CHECKSUM = "files", "xxh3_128"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps done."""
    belongs_to: Mapping[str, str]
    """What it was made with: `plan`, `cache`."""
    files: Mapping[str, Mapping[str, Any]] | None = None
    """By path below the checkpoint: `bytes` and `xxh3_128`; None: written before there were checksums."""
    marker_problem: str | None = None
    """Why the marker itself cannot be trusted."""


def complete_checkpoint(path: Path, belongs_to: Mapping[str, str]) -> None:
    """Make a written checkpoint durable and mark it complete."""
    fsync_tree(path)
    failpoint("checkpoint.before_marker")
    names = sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() and file != path / MARKER
    )
    marker = {**belongs_to, _FILES: {name: _summed(path / name) for name in names}}
    marker[_CHECKSUM] = xxhash.xxh3_128_hexdigest(canonical_json(marker))
    write_atomic(path / MARKER, json.dumps(marker, indent=1).encode(), what="checkpoint")
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
            found.append(_read_marker(path, step))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_incomplete(stage_dir: Path) -> list[Path]:
    """Remove what a killed run left of unfinished checkpoints and exports; return their paths."""
    paths = [path for path, _ in _directories(stage_dir) if not (path / MARKER).is_file()]
    paths += [path for path in stage_dir.glob(".*.partial") if path.is_dir()]
    for path in paths:
        shutil.rmtree(path)
    return paths


def put_damaged_aside(stage_dir: Path, also: Callable[[int], int | None] = lambda step: None) -> str | None:
    """Rename the newest checkpoints until one can be continued, and return a sentence on them; None where the newest
    can be.

    Args:
        stage_dir: directory of the stage.
        also: step of a checkpoint that continuing after a step needs besides, or None.

    Raises:
        TrainingError: none can be continued.
    """
    checkpoints = list_checkpoints(stage_dir)
    problems: dict[Path, str] = {}
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    for checkpoint in reversed(checkpoints):
        needed = by_step.get(also(checkpoint.step) or checkpoint.step, checkpoint)
        problem = damage(checkpoint) or (None if needed == checkpoint else damage(needed))
        if problem is None:
            break
        problems[checkpoint.path] = problem
    if not problems:
        return None
    told = "; ".join(dict.fromkeys(problems.values()))
    if len(problems) == len(checkpoints):
        places = " ".join(str(checkpoint.path) for checkpoint in checkpoints)
        raise TrainingError(
            f"no checkpoint of {stage_dir} can be continued: {told}; put the files back, or remove {places} to train "
            "the stage from its start"
        )
    for path in problems:
        aside = path.with_name(f"{_ASIDE}{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
    fsync_dir(stage_dir)
    last = checkpoints[-1 - len(problems)]
    names = ", ".join(path.name for path in problems)
    return f"{told}; so {names} was renamed to {_ASIDE}... and the training goes on from {last.path}"


def damage(checkpoint: Checkpoint) -> str | None:
    """Say which file of a checkpoint is not what it was when it was written, or None."""
    if checkpoint.marker_problem is not None:
        return f"{checkpoint.path / MARKER} {checkpoint.marker_problem}"
    if checkpoint.files is None:
        return _told_by_formats(checkpoint.path) or _of_another_step(checkpoint)
    for name, wanted in checkpoint.files.items():
        path = checkpoint.path / name
        try:
            if not path.is_file():  # of a pipe or a device no reading would come to an end
                path.stat()
                return f"{path} is no file"
            if path.stat().st_size != wanted["bytes"]:
                return f"{path} has {path.stat().st_size:,} bytes where {wanted['bytes']:,} were written"
            found = _summed(path)
        except OSError as error:
            return f"{path} cannot be read ({refused(error)})"
        if found != wanted:
            return f"{path} was altered after it was written (its checksum differs)"
    return _added(checkpoint) or _of_another_step(checkpoint)


def _added(checkpoint: Checkpoint) -> str | None:
    """Say what lies in a checkpoint that was not written with it, or None: a library that finds it might load it.

    Hidden files are no library's.
    """
    written = {Path(name) for name in (MARKER, *(checkpoint.files or ()))}
    written |= {parent for name in written for parent in name.parents}
    for path in sorted(checkpoint.path.rglob("*")):
        name = path.relative_to(checkpoint.path)
        if name not in written and not any(part.startswith(".") for part in name.parts):
            return f"{path} was not written with the checkpoint"
    return None


def _of_another_step(checkpoint: Checkpoint) -> str | None:
    """Say that a checkpoint is named after a step that it is not of, or None."""
    path = checkpoint.path / STATE_FILE
    if not path.is_file():
        return None
    try:
        step = strict_json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} does not say its step ({reason_of(error, 100)})"
    return None if step == checkpoint.step else f"{path} is of step {step}, not of step {checkpoint.step}"


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
        TrainingError: it was made with another plan, other caches or other settings.
    """
    checkpoints = list_checkpoints(stage_dir)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    for checkpoint in checkpoints:  # the best of them may not be the newest
        if checkpoint.belongs_to.get(SETTINGS, belongs_to.get(SETTINGS)) != belongs_to.get(SETTINGS):
            raise TrainingError(
                f"{checkpoint.path} was made by a stage of other settings than those in {stage_dir}, so it cannot be "
                "continued; remove it, or put back the one that was written there"
            )
    for name in sorted(belongs_to.keys() - {SETTINGS}):
        found, wanted = newest.belongs_to.get(name), belongs_to[name]
        if found != wanted:
            raise TrainingError(
                f"{newest.path} was made with {name} {found} where this run has {name} {wanted}, so it cannot be "
                f"continued; remove or rename {stage_dir} to train the stage again, or go back to what it was made with"
            )
    return newest


def _read_marker(path: Path, step: int) -> Checkpoint:
    """Read the marker of a checkpoint; one that cannot be trusted is told by `marker_problem`."""
    try:
        if (path / MARKER).stat().st_size > MAX_BYTES:
            raise ValueError("no marker is that large")
        marker = strict_json.loads((path / MARKER).read_text(encoding="utf-8"))
        summed = {name: value for name, value in marker.items() if name != _CHECKSUM}
        files = summed.pop(_FILES, None)
        whole = summed if files is None else {**summed, _FILES: files}
        told = None if files is None and _CHECKSUM not in marker else xxhash.xxh3_128_hexdigest(canonical_json(whole))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return Checkpoint(path, step, {}, marker_problem=f"cannot be read ({type(error).__name__})")
    if told != marker.get(_CHECKSUM):
        return Checkpoint(path, step, {}, marker_problem="was altered after it was written (its checksum differs)")
    return Checkpoint(path, step, summed, files)


def _summed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return {"bytes": file.tell(), "xxh3_128": digest.hexdigest()}


def _told_by_formats(path: Path) -> str | None:
    """Say which file of a checkpoint without checksums its own format finds damaged, or None."""
    for file in sorted(path.iterdir()):
        try:
            if not file.is_file() and not file.is_dir():  # of a pipe no reading would come to an end
                return f"{file} is no file"
            if file.suffix == ".json":
                strict_json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(file) as archive:
                    bad = archive.testzip()
                if bad is not None:
                    return f"{file} is damaged at {bad}"
            elif file.suffix == ".safetensors":
                safe_open(file, framework="numpy")  # reads the header and compares it with the length
        # all that json, zipfile and its zlib, and safetensors raise on files that were cut or altered: zipfile's
        # RuntimeError is for what looks encrypted or packed in another way
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
            return f"{file} cannot be read ({reason_of(error, 100)})"
    return None


def _directories(stage_dir: Path) -> list[tuple[Path, int]]:
    if not stage_dir.is_dir():
        return []
    matches = ((path, _NAME.fullmatch(path.name)) for path in stage_dir.iterdir() if path.is_dir())
    return [(path, int(match[1])) for path, match in matches if match]

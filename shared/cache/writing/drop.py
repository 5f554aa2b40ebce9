"""Take rows or a layer out of a cache: the parts of a job or of a source with their targets, or a layer's directory.

A part is committed by its record, so records go before files. The rows go first, then what layers say of them; while
that lasts, `dropping.json` names the parts, so that `verify` knows why a layer speaks of rows that are not there.
A layer's own files go before those of the sequences, and a job's plan goes last: a build that comes in between takes
the old sequences up again, and never old targets for new rows. Killed at any moment, the same call continues; it also
ends what another call began and did not end. No build of the cache may run meanwhile.

Cost: one system call per file, one fsync per folder and step; a source reads every record.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.atomic import TEMPORARY_MARK, fsync_dir, write_atomic
from shared.cache.layout import read_header, sequences_dir
from shared.errors import CacheError, DamagedError, NamingError
from shared.parts.cache_files import list_folder
from shared.parts.part_stats import Strict
from shared.parts.records import list_records, read_sealed, sealed_json
from shared.process.failpoints import failpoint
from shared.schema import FORMAT_VERSION, JOB_PATTERN, LAYER_PATTERN, STEM_PATTERN

_MARK = "dropping.json"


class _Mark(Strict):
    """What it says."""

    format: int
    stems: Any = None


@dataclass(frozen=True, slots=True)
class Drop:
    """What is to be removed from a cache."""

    path: Path
    stems: frozenset[str] = frozenset()
    """Parts, with what every layer says of them."""
    directories: tuple[Path, ...] = ()
    """A layer's directory or a job's, emptied last."""
    jobs: tuple[str, ...] = ()
    """First 8 digits of jobs whose plans stay and list removed rows, so that the same recipe would build them again."""

    def files(self) -> list[Path]:
        """Return the files in the order in which they go."""
        return [file for step in self._steps() for file in step]

    def _steps(self) -> list[list[Path]]:
        rows = sequences_dir(self.path)
        layers = _layer_folders(self.path)
        steps = [
            _existing([rows], self.stems, ".json"),
            _existing(layers, self.stems, ".json"),
            _existing(layers, self.stems, ".arrow"),
            _existing([rows], self.stems, ".arrow"),
        ]
        for folder in self.directories:
            names = list_folder(folder)
            first = [name for name in names if name in ("layer.json", "plan.arrow")]
            records = [name for name in names if _is_part(name, ".json")]
            rest = [name for name in names if _is_part(name, ".arrow") or TEMPORARY_MARK in name]
            steps += [[folder / name for name in step] for step in (first, records, rest)]
        return steps


def drop_job(path: Path, job: str) -> Drop:
    """Describe the removal of a job, named by 8 digits of its id or more: its plan, and its parts with their targets in
    every layer.

    Raises:
        CacheError: no cache, no such job, or several that begin so.
    """
    read_header(path)
    plans = [name for name in list_folder(path / "jobs") if JOB_PATTERN.fullmatch(name)]
    stems = _all_stems(path)
    known = {name[:8]: name for name in sorted({stem[5:13] for stem in stems}) + plans}  # a plan's name is the longer
    wanted = job if re.fullmatch(r"[0-9a-f]{8,32}", job) else "-"
    fitting = [id8 for id8, name in known.items() if name.startswith(wanted) or (len(name) == 8 and wanted[:8] == name)]
    if len(fitting) != 1:
        listed = ", ".join(sorted(known)) or "none"
        raise NamingError(f"{path} has no job {job!r} (there are: {listed}); give 8 digits or more of one of these")
    directories = tuple(path / "jobs" / name for name in plans if name[:8] == fitting[0])
    return Drop(path, frozenset(stem for stem in stems if stem[5:13] == fitting[0]) | _interrupted(path), directories)


def drop_source(path: Path, source: str) -> Drop:
    """Describe the removal of the parts that hold rows of one source alone.

    Raises:
        CacheError: no cache, no such source, or a part that holds rows of another source besides.
    """
    read_header(path)
    records = {record.stem: sorted(record.stats.get("sources", {})) for record in list_records(sequences_dir(path))}
    chosen = {stem: names for stem, names in records.items() if source in names}
    begun = _interrupted(path)
    if not chosen and not begun:
        listed = ", ".join(sorted({name for names in records.values() for name in names})) or "none"
        raise NamingError(f"{path} has no rows of source {source!r} (there are: {listed}); name one of these")
    for stem, names in chosen.items():
        if len(names) > 1:
            other = next(name for name in names if name != source)
            raise NamingError(
                f"{sequences_dir(path) / stem}.arrow holds rows of {source!r} and of {other!r}, and a part goes as a "
                f"whole; drop its job (`--job {stem[5:13]}`) and teach the other prompts again, or leave the source "
                "out of training by the stages' `mixture`"
            )
    plans = {name[:8] for name in list_folder(path / "jobs") if JOB_PATTERN.fullmatch(name)}
    return Drop(path, frozenset(chosen) | begun, jobs=tuple(sorted({stem[5:13] for stem in chosen} & plans)))


def drop_layer(path: Path, layer: str) -> Drop:
    """Describe the removal of a targets layer or a hidden layer by NAME or NAME-HASH8, which leaves the rows.

    Raises:
        CacheError: no cache, no such layer, or several of that name.
    """
    read_header(path)
    folders = [folder for folder in _layer_folders(path) if LAYER_PATTERN.fullmatch(folder.name)]
    fitting = [folder for folder in folders if layer in (folder.name, folder.name[:-9])]
    if len(fitting) != 1:
        found = "no layer" if not fitting else f"{len(fitting)} layers"
        listed = ", ".join(folder.name for folder in folders) or "none"
        raise NamingError(f"{path} has {found} named {layer!r} (there are: {listed}); give one of these names in full")
    return Drop(path, _interrupted(path), (fitting[0],))


def carry_out(drop: Drop) -> int:
    """Remove what a `Drop` describes; return how many files that were.

    Raises:
        CacheError: a file cannot be removed, or a folder holds something that is not of a cache.
    """
    mark, count = drop.path / _MARK, 0
    try:
        if drop.stems:
            write_atomic(mark, sealed_json({"format": FORMAT_VERSION, "stems": sorted(drop.stems)}), "dropping")
        steps = drop._steps()
        for step in steps[:4]:
            count += _remove(step)
        _remove([mark])
        for step in steps[4:]:
            count += _remove(step)
        for folder in drop.directories:
            with contextlib.suppress(FileNotFoundError):
                failpoint("drop.before_rmdir")
                folder.rmdir()
                fsync_dir(folder.parent)
    except OSError as error:
        raise CacheError(
            f"{error.filename or drop.path} cannot be removed: {error.strerror}; mend that and give the same command "
            "again"
        ) from None
    return count


def dropping(path: Path) -> frozenset[str]:
    """Return the parts whose removal was begun and not ended.

    Raises:
        DamagedError: dropping.json contradicts the format.
    """
    mark = path / _MARK
    if not mark.exists() and not mark.is_symlink():
        return frozenset()
    stems = read_sealed(mark, _Mark).get("stems")
    if not isinstance(stems, list) or not all(isinstance(s, str) and STEM_PATTERN.fullmatch(s) for s in stems):
        raise DamagedError(f"{mark} does not list parts; delete it and give the interrupted `cache drop` again")
    return frozenset(stems)


def _interrupted(path: Path) -> frozenset[str]:
    """Return parts of an interrupted removal; those that a build has taken up again stay."""
    begun = dropping(path)
    return (
        begun - {name[:-5] for name in list_folder(sequences_dir(path)) if name.endswith(".json")} if begun else begun
    )


def _all_stems(path: Path) -> set[str]:
    names = {name for folder in (sequences_dir(path), *_layer_folders(path)) for name in list_folder(folder)}
    return {name.rsplit(".", 1)[0] for name in names if _is_part(name, ".json") or _is_part(name, ".arrow")}


def _layer_folders(path: Path) -> list[Path]:
    return [path / kind / name for kind in ("targets", "hidden") for name in list_folder(path / kind)]


def _is_part(name: str, ending: str) -> bool:
    return name.endswith(ending) and STEM_PATTERN.fullmatch(name.removesuffix(ending)) is not None


def _existing(folders: Iterable[Path], stems: frozenset[str], ending: str) -> list[Path]:
    return [
        folder / name
        for folder in (folders if stems else ())
        for name in list_folder(folder)
        if name.endswith(ending) and name.removesuffix(ending) in stems
    ]


def _remove(files: list[Path]) -> int:
    for file in files:
        failpoint("drop.before_unlink")
        file.unlink(missing_ok=True)
    for folder in sorted({file.parent for file in files}):
        failpoint("drop.before_fsync_dir")
        fsync_dir(folder)
    return len(files)

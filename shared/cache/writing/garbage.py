"""Remove what killed writers left behind: temporary files, parts without a record and layers without a part.

A writer at work has such files too, so only those that nobody touched for an hour count, and none that its writer has
locked, since a clock may jump. Nothing that a reader sees is touched, and no link is followed. A part without a record
may be adopted by a build at any moment. So it is renamed first, then removed if there is still no record, else linked
back; and a build looks for its part once the record is written (shared/parts/parts.py). Whichever comes first, no
record stays without its part. Likewise a layer's writer looks for layer.json before and after each part
(shared/cache/writing/layer_writer.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from shared.atomic import TEMPORARY_MARK, is_being_written
from shared.cache.layout import read_header
from shared.errors import CacheError, refused
from shared.parts.cache_files import list_folder
from shared.schema import STEM_PATTERN

MIN_AGE_SECONDS = 3600.0


def collect_garbage(path: Path | str, dry_run: bool, min_age_seconds: float = MIN_AGE_SECONDS) -> list[Path]:
    """Remove temporary files and orphaned parts of a cache that did not change for so long; return their paths, which
    `dry_run` only lists.

    Raises:
        CacheError: not a cache, one of its folders is a link, or a file cannot be removed.
    """
    path = Path(path)
    read_header(path)
    newest = time.time() - min_age_seconds
    try:
        old = (file for file in _abandoned(path) if _is_old(file, newest))
        found = sorted(old, key=lambda file: (file.name == "layer.json", file))
        return found if dry_run else [file for file in found if _remove(file)]
    except OSError as error:
        raise CacheError(f"{error.filename or path} cannot be cleaned up: {refused(error)}") from None


def _is_old(file: Path, newest: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        found = file.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_mtime <= newest and not is_being_written(file)
    return False


def _remove(file: Path) -> bool:
    """Remove a file; False where somebody else did, or a part got its record in the meantime."""
    if TEMPORARY_MARK in file.name:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            return True
        return False
    if file.name == "layer.json":
        return _remove_layer(file)
    aside = file.with_name(f".{file.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return False
    adopted = file.with_suffix(".json").exists()
    if adopted:
        with contextlib.suppress(FileExistsError):
            os.link(aside, file)
    aside.unlink()
    return not adopted


def _remove_layer(file: Path) -> bool:
    """Remove a layer's directory; False where anything but its layer.json is in it by now."""
    if list_folder(file.parent) != [file.name]:
        return False
    with contextlib.suppress(FileNotFoundError):
        file.unlink()
    with contextlib.suppress(OSError):  # a part came in between, and its writer restores layer.json
        file.parent.rmdir()
    return True


def _abandoned(path: Path) -> Iterator[Path]:
    """Yield temporary files and parts without a record."""
    places = [path, path / "sequences", path / "tokenizer"]
    for parent in (path / "jobs", path / "targets", path / "hidden", path / "tokenizer"):
        places += [parent / name for name in list_folder(parent) if stat.S_ISDIR((parent / name).lstat().st_mode)]
    for place in places:
        names = {entry.name for entry in os.scandir(path)} if place == path else set(list_folder(place))
        for name in names:
            stem = name.removesuffix(".arrow")
            empty_layer = (
                name == "layer.json"
                and place.parent in (path / "targets", path / "hidden")
                and not any(STEM_PATTERN.fullmatch(other.removesuffix(".json")) for other in names)
            )
            orphan = stem != name and STEM_PATTERN.fullmatch(stem) and f"{stem}.json" not in names
            if orphan or empty_layer or (name.startswith(".") and TEMPORARY_MARK in name):
                yield place / name

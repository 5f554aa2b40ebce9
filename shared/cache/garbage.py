"""Remove what killed writers left behind: temporary files and parts without a record.

A writer at work has such files too, so only those that nobody touched for an hour count. Nothing that a reader sees is
touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from shared.atomic import TEMPORARY_MARK
from shared.cache.layout import read_header
from shared.errors import CacheError
from shared.schema import STEM_PATTERN

MIN_AGE_SECONDS = 3600.0


def collect_garbage(path: Path | str, dry_run: bool, min_age_seconds: float = MIN_AGE_SECONDS) -> list[Path]:
    """Remove old temporary files and orphaned parts of a cache; return their paths.

    Args:
        path: the cache.
        dry_run: only list them.
        min_age_seconds: leave what changed since.

    Raises:
        CacheError: not a cache, or a file cannot be removed.
    """
    path = Path(path)
    read_header(path)
    newest = time.time() - min_age_seconds
    try:
        found = sorted(file for file in _abandoned(path) if file.lstat().st_mtime <= newest)
        if not dry_run:
            for file in found:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"{path} cannot be cleaned: {error}; check its permissions") from None
    return found


def _abandoned(path: Path) -> Iterator[Path]:
    """Yield temporary files and parts without a record; directories that are links are not entered."""
    places = [path, path / "sequences", path / "tokenizer"]
    for parent in (path / "jobs", path / "targets", path / "hidden", path / "tokenizer"):
        places += [child for child in parent.glob("*") if child.is_dir() and not child.is_symlink()]
    for place in places:
        for file in place.glob(f".*{TEMPORARY_MARK}*"):
            if file.is_file() and not file.is_symlink():
                yield file
        for file in place.glob("part-*.arrow"):
            if STEM_PATTERN.fullmatch(file.stem) and not file.with_suffix(".json").exists():
                yield file

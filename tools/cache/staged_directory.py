"""A directory that is whole or not there: written beside its place, named after what it will hold, then renamed.

The name ends in the id of the content, so the same command continues after a kill and no other does.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from shared.atomic import TEMPORARY_MARK, fsync_dir
from shared.cache.within import refuse_within_cache
from shared.errors import CacheError


def staging_path(out: Path, doing: str, content_id: str) -> Path:
    """Return where `out` is written, in the same directory: `.OUT.DOING-ID8`."""
    whole = out.absolute()
    return whole.with_name(f".{whole.name}.{doing}-{content_id[:8]}")


def unfinished(out: Path, doing: str) -> list[str]:
    """Return what killed commands of that kind left beside `out`."""
    whole = out.absolute()
    return sorted(str(path) for path in whole.parent.glob(f".{whole.name}.{doing}-*"))


def refuse_existing(out: Path, wanted: str) -> None:
    """Refuse a place that holds something, or that lies in a cache, among whose files nothing else belongs.

    Raises:
        CacheError: it does, and is not `wanted`.
        UsageError: it lies in a cache.
    """
    refuse_within_cache(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CacheError(f"{out} exists and is not {wanted}; name a directory that does not exist")


def publish(staging: Path, out: Path, proof: Path) -> None:
    """Give the finished directory its name, without what killed commands left in it.

    Args:
        staging: the finished directory.
        out: its name.
        proof: a file of `out` that only the same content has.

    Raises:
        CacheError: `out` is taken by something else, or cannot be created.
    """
    try:
        for left in staging.rglob(
            f".*{TEMPORARY_MARK}*"
        ):  # whoever still writes one could not finish after the renaming
            left.unlink(missing_ok=True)
        staging.rename(out)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT) and proof.exists():
            shutil.rmtree(staging, ignore_errors=True)
            return  # the same command ran elsewhere at the same time and was first
        raise CacheError(
            f"{staging} is finished but cannot be renamed to {out}: {error.strerror}; move it there"
        ) from None
    fsync_dir(out.absolute().parent)

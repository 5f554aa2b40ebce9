"""A directory, or a cache, that is whole or not there: written beside its place, named after what it will hold, then
renamed.

The name ends in the id of the content, so the same command continues after a kill and no other does. Two of the same
command at once would write, link and rename each other's files: whoever writes holds a lock on the directory, which
ends with its process. A cache that is made of something else has one job, whose plan is empty because nothing is left
to do; its id hashes what was asked and of what.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.atomic import TEMPORARY_MARK, fsync_dir, make_dir
from shared.cache.layout import refuse_within_cache
from shared.errors import CacheError, NamingError
from shared.parts.jobs import create_job, job_id
from shared.places import resolved


def staging_path(out: Path, doing: str, content_id: str) -> Path:
    """Return where `out` is written, in the same directory: `.OUT.DOING-ID8`; of a link, where it leads."""
    whole = resolved(out)
    return whole.with_name(f".{whole.name}.{doing}-{content_id[:8]}")


def unfinished(out: Path, doing: str) -> list[str]:
    """Return what killed commands of that kind left beside `out`."""
    whole = resolved(out)
    return sorted(str(path) for path in whole.parent.glob(f".{glob.escape(whole.name)}.{doing}-*"))


def refuse_existing(out: Path, wanted: str) -> None:
    """Refuse a place that holds something, or that lies in a cache, among whose files nothing else belongs.

    Raises:
        CacheError: it does, and is not `wanted`.
        UsageError: it lies in a cache.
    """
    refuse_within_cache(out)
    if resolved(out).is_symlink():
        raise NamingError(f"{out} is a link in a circle of links; remove it, or name a directory that does not exist")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NamingError(f"{out} exists and is not {wanted}; name a directory that does not exist")


_held: dict[Path, int] = {}
"""Directories that this process writes -> their descriptors, which hold the lock."""


def claim(staging: Path) -> None:
    """Create a directory beside its place, or take one that a killed command left, for this process alone.

    Raises:
        CacheError: another process writes it, or it cannot be created.
    """
    make_dir(staging)
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        raise _busy(staging) from None  # it was renamed meanwhile
    held = _held.get(staging)
    if held is not None and os.path.samestat(os.fstat(held), os.fstat(descriptor)):
        os.close(descriptor)
        return
    _release(staging)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_same = staging.exists() and os.path.samestat(staging.stat(), os.fstat(descriptor))
    except BlockingIOError:
        is_same = False
    except OSError:  # a file system without locks: whoever publishes first wins
        is_same = True
    if not is_same:
        os.close(descriptor)
        raise _busy(staging)
    _held[staging] = descriptor


def _busy(staging: Path) -> CacheError:
    return CacheError(
        f"{staging} is written by another process that does the same; let it end, then run this command again, which "
        "takes what it made or goes on from there"
    )


def _release(staging: Path) -> None:
    descriptor = _held.pop(staging, None)
    if descriptor is not None:
        os.close(descriptor)


def publish(staging: Path, out: Path, proof: Path) -> None:
    """Give the finished directory its name, without what killed commands left in it; `proof` is a file of `out` that
    only the same content has.

    Raises:
        CacheError: `out` is taken by something else, or cannot be created.
    """
    try:
        for left in staging.rglob(
            f".*{TEMPORARY_MARK}*"
        ):  # whoever still writes one could not finish after the renaming
            left.unlink(missing_ok=True)
        staging.rename(resolved(out))
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT) and proof.exists():
            shutil.rmtree(staging, ignore_errors=True)
            return  # the same command ran elsewhere at the same time and was first
        raise CacheError(
            f"{staging} is finished but cannot be renamed to {out}: {error.strerror}; move it there"
        ) from None
    finally:
        _release(staging)
    fsync_dir(resolved(out).parent)


@contextmanager
def staged(out: Path, doing: str, content_id: str, proof: Path) -> Iterator[Path]:
    """Yield the directory where `out` is written, of this process alone, and give it its name once all is in it.

    Raises:
        CacheError: as for `claim` and `publish`.
    """
    staging = staging_path(out, doing, content_id)
    claim(staging)
    yield staging
    publish(staging, out, proof)


@dataclass(frozen=True, slots=True)
class DerivedCache:
    """Where a cache that a command makes of something else is, or is written."""

    out: Path
    doing: str
    request: Mapping[str, Any]
    job: str
    proof: Path
    """A file of `out` that only this cache has."""
    existed: bool
    """Whether `out` holds it already."""

    @classmethod
    def of(cls, out: Path, doing: str, wanted: str, request: Mapping[str, Any]) -> DerivedCache:
        """Look for a cache, whose equal is of an equal request; `doing` is the word of the directory beside it, such as
        `merging`, and `wanted` what the message calls it.

        Raises:
            CacheError: `out` is something else.
        """
        job = job_id(request)
        proof = out / "jobs" / job / "plan.arrow"
        existed = (out / "cache.json").is_file() and proof.is_file()
        if not existed:
            refuse_existing(out, wanted)
        return cls(out, doing, request, job, proof, existed)

    @property
    def path(self) -> Path:
        """`out` where it existed, else the directory beside it that will be renamed."""
        return self.out if self.existed else staging_path(self.out, self.doing, self.job)

    def stem(self, number: int) -> str:
        """Return the name of its part `number`."""
        return f"part-{self.job[:8]}-{number:06d}"

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write `path`, with its empty plan, for this process alone; it becomes `out` once all is in it.

        Raises:
            CacheError: another process of the same command writes it, or it cannot be written.
        """
        with staged(self.out, self.doing, self.job, self.proof) as path:
            create_job(path, self.request, (), 1)
            yield

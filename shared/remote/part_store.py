"""Fetched parts on this machine: each once, named by its checksum, all together within a bound.

A part is written to `XXH3.SIZE.partial`, whose writer holds a lock that ends with its process: who comes second waits
and finds the part, who follows a killed one goes on where it stopped. Only a file of the right size and checksum gets
the name `XXH3.arrow`, by rename. Before a part comes, those that nobody opened for the longest go, and while others
come that leave it no room, it waits; whoever has a part mapped keeps reading it. A part's checksum is compared once per
process, so a disk that forgets is noticed and the part fetched again. Cost: one pass of the checksum over a part as it
comes, one at its first use in a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

import xxhash

from shared.atomic import make_dir
from shared.errors import CacheError, DamagedError, UsageError, refused
from shared.places import store_dir
from shared.process.failpoints import failpoint
from shared.remote.transfer import BLOCK_BYTES

BOUND_VARIABLE = "DECANT_STORE_GB"
"""Gigabytes (powers of ten) of fetched parts that this machine keeps."""
DEFAULT_GB = 20.0
_PARTIAL = re.compile(r"([0-9a-f]{32})\.([0-9]+)\.partial")
_WAIT_SECONDS = 0.01

Read = Callable[[int, int], bytes]
"""Returns bytes [start, end) of the part."""

_checked: set[Path] = set()
"""Parts whose checksum this process has compared."""


def bound_bytes() -> int:
    """Return how many bytes of fetched parts are kept.

    Raises:
        UsageError: the variable is no number above 0.
    """
    text = os.environ.get(BOUND_VARIABLE, str(DEFAULT_GB))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise UsageError(f"{BOUND_VARIABLE} is {text[:40]!r}; expected gigabytes, such as {DEFAULT_GB:g}")
    return int(found * 1e9)


def parts_dir() -> Path:
    """Return the directory of fetched parts."""
    return store_dir() / "parts"


def fetch_part(where: str, num_bytes: int, xxh3: str, read: Read) -> Path:
    """Return the file of a part, fetching it first where it is not here.

    Args:
        where: its URL, for messages.
        num_bytes: its size, from its record.
        xxh3: xxh3-128 in hexadecimal, from its record.
        read: reads a range of it.

    Raises:
        DamagedError: what came is not what the record says.
        CacheError: it does not fit the bound, cannot be fetched or cannot be kept.
    """
    if num_bytes > bound_bytes():
        raise CacheError(
            f"{where} has {num_bytes:,} bytes where {BOUND_VARIABLE} keeps {bound_bytes():,}; raise it above that"
        )
    path = parts_dir() / f"{xxh3}.arrow"
    partial = path.with_name(f"{xxh3}.{num_bytes}.partial")
    make_dir(path.parent)
    while not _is_here(path, num_bytes, xxh3):
        with _locked(path.parent.with_suffix(".lock")) as lock:  # one reader after another looks for room
            while not _make_room(partial, num_bytes):
                time.sleep(_WAIT_SECONDS)
            fill_checked(path, partial, where, num_bytes, xxh3, read, lambda: fcntl.flock(lock.fileno(), fcntl.LOCK_UN))
        _checked.add(path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BufferedRandom]:
    """Yield a file, made where it is missing, once no other process holds it."""
    try:
        with path.open("a+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield file
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror or error}; name a disk with space and locks in DECANT_STORE"
        ) from None


def fill_checked(
    path: Path,
    partial: Path,
    where: str,
    num_bytes: int,
    xxh3: str,
    read: Read,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Create `path` from a URL through `partial`, going on where a killed process left that.

    Args:
        path: the file; left as it is where it is there, and whole, once no other process writes `partial`.
        partial: its unfinished form, in the same directory.
        where: URL, for messages.
        num_bytes: size.
        xxh3: checksum.
        read: reads a range.
        before: called once `partial` is this process's.

    Raises:
        DamagedError: what came has another checksum, or nothing is there.
        CacheError: it cannot be fetched or written.
    """
    while True:
        with _locked(partial) as file:
            if not partial.exists() or partial.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # who held it before made the part, or gave up: whoever holds a new one finds out
            if _is_whole(path, num_bytes, xxh3):
                partial.unlink(missing_ok=True)
                return
            before()
            try:
                _fill(file, where, num_bytes, xxh3, read)
            except DamagedError:
                partial.unlink(missing_ok=True)
                raise
            failpoint("fetch.before_rename")
            os.fsync(file.fileno())
            partial.replace(path)
            failpoint("fetch.after_rename")
            return


def _is_whole(path: Path, num_bytes: int, xxh3: str) -> bool:
    """Tell whether a file is there and has a part's size and checksum."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == num_bytes and hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() == xxh3
    except FileNotFoundError:
        return False


def _is_here(path: Path, num_bytes: int, xxh3: str) -> bool:
    """Tell whether a part is here and whole, and note that it is in use; take a damaged one away."""
    try:
        known = path in _checked and path.stat().st_size == num_bytes
        if known or _is_whole(path, num_bytes, xxh3):
            _checked.add(path)
            os.utime(path)
            return True
        path.unlink(missing_ok=True)
        _checked.discard(path)
    except FileNotFoundError:  # never fetched, or taken away for room: either way it is fetched next
        return False
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {refused(error)}") from None
    return False


def _fill(file: BufferedRandom, where: str, num_bytes: int, xxh3: str, read: Read) -> None:
    """Write what is missing of a part and compare the whole; what a killed writer left counts only if it fits."""
    for resumed in (True, False):
        file.seek(0)
        digest = hashlib.file_digest(file, xxhash.xxh3_128) if resumed else xxhash.xxh3_128()
        start = file.tell()
        if not resumed or start > num_bytes:
            file.truncate(0)
            digest, start = xxhash.xxh3_128(), 0
        begun = start
        while start < num_bytes:
            try:
                data = read(start, min(start + BLOCK_BYTES, num_bytes))
            except FileNotFoundError:
                raise DamagedError(
                    f"{where} is not there and its record is; restore it from a copy, or push the cache again"
                ) from None
            file.write(data)
            digest.update(data)
            start += len(data)
        file.flush()
        if digest.hexdigest() == xxh3:
            return
        if not begun:
            break
    raise DamagedError(
        f"{where} has checksum {digest.hexdigest()} where its record says {xxh3}; it was altered after it was "
        "committed: nothing of it is used; restore it from a copy, or push it again"
    )


def _make_room(own: Path, num_bytes: int) -> bool:
    """Remove the parts that were used the longest ago until one of `num_bytes` fits beside those that others fetch;
    return whether it does.
    """
    found = sorted(_used_and_size(path) for path in _all_parts(own.parent) if path != own)
    total, bound = num_bytes + sum(size for _, size, _ in found), bound_bytes()
    for _, size, path in found:
        if total <= bound:
            break
        if _removed(path):
            total -= size
    return total <= bound


def _all_parts(directory: Path) -> list[Path]:
    """Return every part there is: one that gets its name while the directory is listed may be in that list under
    neither name, but not in two lists after one another.
    """
    before: list[Path] | None = None
    while before != (found := sorted(directory.iterdir())):
        before = found
    return found


def _used_and_size(path: Path) -> tuple[float, int, Path]:
    """Return when a part was last used, the bytes it has or will have, and its path."""
    reserved = _PARTIAL.fullmatch(path.name)
    try:
        status = path.stat()
    except FileNotFoundError:  # a partial file that went since has become a part
        return math.inf, int(reserved[2]) if reserved else 0, path
    return status.st_mtime, int(reserved[2]) if reserved else status.st_size, path


def _removed(path: Path) -> bool:
    """Remove a part, or a partial file whose writer is gone; False where one is being written or has become a part."""
    if path.suffix == ".arrow":
        path.unlink(missing_ok=True)
        return True
    try:
        with path.open("r+b") as file:  # for writing, or network file systems refuse the lock
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    except (BlockingIOError, FileNotFoundError):
        return False

"""Files that exist whole or not at all, even after `kill -9` or a power cut.

Algorithm: write a temporary file beside the target, fsync it, then either rename it over the target (last one wins) or
link it to the target (first one wins, the others learn that they came second), then fsync the directory. Temporary
names hold the process id and a random part; no reader opens one, and `shared/cache/writing/garbage.py` removes old
ones. Cost: two fsyncs per file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shared.errors import CacheError, refused
from shared.process.failpoints import failpoint

TEMPORARY_MARK = ".tmp-"
"""Within the name of every temporary file, and of no other."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

Fill = Callable[[BinaryIO], object]
"""Writes a file's bytes to an open file."""


def write_atomic(path: Path, data: bytes | memoryview, what: str) -> None:
    """Write `data` to `path` by temporary file, fsync and rename; a file that is there is replaced.

    Args:
        path: the file; its directory exists.
        data: all of its bytes.
        what: name of its fail-points.

    Raises:
        CacheError: the disk is full, or the file cannot be written.
    """
    fill_atomic(path, lambda file: file.write(data), what, len(data))


def fill_atomic(path: Path, fill: Fill, what: str, expected_bytes: int) -> None:
    """Like `write_atomic`, with bytes that `fill` writes; `expected_bytes` only serves the message of a full disk, and
    is 0 where it is not known.
    """
    with _temporary(path, fill, what, expected_bytes) as temporary:
        failpoint(f"{what}.before_rename")
        temporary.replace(path)
        failpoint(f"{what}.after_rename")
        _fsync_name(path, what)


def link_exclusive(path: Path, data: bytes | memoryview, what: str) -> bool:
    """Create `path` with `data` unless it exists, also against other machines on the same file system; arguments as for
    `write_atomic`.

    Returns:
        False where the file was there first; it is left as it is.

    Raises:
        CacheError: the disk is full, the file cannot be written, or the file system has no hard links.
    """
    return fill_exclusive(path, lambda file: file.write(data), what, len(data))


def fill_exclusive(path: Path, fill: Fill, what: str, expected_bytes: int, step: str = "rename") -> bool:
    """Like `link_exclusive`, with bytes that `fill` writes; `expected_bytes` is that of `fill_atomic`.

    `step` is what the fail-points call the link.
    """
    with _temporary(path, fill, what, expected_bytes) as temporary:
        failpoint(f"{what}.before_{step}")
        created = True
        try:
            os.link(temporary, path)
        except FileExistsError:
            created = False
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise CacheError(
                    f"{path} cannot be created exclusively: its file system has no hard links ({error.strerror}); "
                    "put the cache on one that has"
                ) from None
            raise
        failpoint(f"{what}.after_{step}")
        _fsync_name(path, what)
        return created


def _fsync_name(path: Path, what: str) -> None:
    failpoint(f"{what}.before_fsync_dir")
    fsync_dir(path.parent)
    failpoint(f"{what}.after_fsync_dir")


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dir(path: Path) -> None:
    """Create a directory with its parents and make their names durable; one that is there is left as it is.

    Raises:
        CacheError: it cannot be created.
    """
    try:
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        if missing:
            failpoint("directory.before_mkdir")
        path.mkdir(parents=True, exist_ok=True)
        if missing:
            failpoint("directory.after_mkdir")
        for created in missing:
            _fsync_name(created, "directory")
    except OSError as error:
        raise CacheError(f"{path} cannot be created: {refused(error)}") from None


def is_being_written(path: Path) -> bool:
    """Tell whether a process writes a temporary file; False, too, where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _temporary(path: Path, fill: Fill, what: str, expected_bytes: int) -> Iterator[Path]:
    """Yield a durable temporary file beside `path`; remove its name afterwards; explain what the system refuses."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            failpoint(f"{what}.before_write")
            fill(file)
            failpoint(f"{what}.after_write")
            failpoint(f"{what}.before_fsync")
            file.flush()
            os.fsync(file.fileno())
            failpoint(f"{what}.after_fsync")
        yield temporary
    except OSError as error:
        raise _explained(path, error, expected_bytes) from None
    finally:
        with contextlib.suppress(OSError):  # renamed already, or the disk refuses even this; gc removes it later
            temporary.unlink(missing_ok=True)


def _explained(path: Path, error: OSError, expected_bytes: int) -> CacheError:
    if error.errno not in _FULL:
        return CacheError(f"{path} cannot be written: {refused(error)}")
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
    except OSError:
        free = "the free space is unknown"
    needed = f"it needs {expected_bytes:,} bytes and {free}" if expected_bytes else free
    return CacheError(
        f"{path} cannot be written: {error.strerror}; {needed}, so free some space or lift the limit, then run "
        "the same command again"
    )

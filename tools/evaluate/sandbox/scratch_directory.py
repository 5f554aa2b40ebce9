"""The private directory of a confined program: is it too full, and how it is removed whatever was left in it.

A program may nest directories until no path names the innermost, and make some that may not be looked into. Looking
is by path and stops at the first that cannot be; removing moves every directory's entries up to the top by
descriptors, so that no path is long and nothing recurses. Cost: linear in entries, three descriptors.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def too_full(scratch: Path, most_bytes: int, most_entries: int) -> str:
    """Return what is wrong with a directory in a few words; empty where it is within its limits."""
    num_bytes = num_entries = 0
    waiting = [scratch]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    num_entries += 1
                    num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    if num_entries > most_entries:
                        return f"made more than {most_entries} files"
        except FileNotFoundError:
            continue  # it was removed meanwhile
        except OSError as error:
            return f"made a directory that cannot be looked into ({error.strerror})"
    return f"wrote more than {most_bytes} bytes" if num_bytes > most_bytes else ""


def remove(scratch: Path) -> None:
    """Remove a directory in which nothing runs any more, however deep and whatever its modes.

    Raises:
        OSError: something in it cannot be removed.
    """
    top = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        waiting = os.listdir(top)  # noqa: PTH208 - of a descriptor
        while waiting:
            name = waiting.pop()
            try:
                os.unlink(name, dir_fd=top)
                continue
            except (IsADirectoryError, PermissionError):  # Linux says the first of a directory, POSIX the second
                os.chmod(name, 0o700, dir_fd=top)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                for entry in os.listdir(inner):  # noqa: PTH208 - of a descriptor
                    waiting.append(secrets.token_hex(16))
                    _make_movable(entry, inner)
                    os.rename(entry, waiting[-1], src_dir_fd=inner, dst_dir_fd=top)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    scratch.rmdir()


def _make_movable(entry: str, directory: int) -> None:
    """Let a directory be moved: its `..` changes, which takes the right to write in it."""
    if stat.S_ISDIR(os.stat(entry, dir_fd=directory, follow_symlinks=False).st_mode):
        os.chmod(entry, 0o700, dir_fd=directory)

"""A directory of files that libraries open by themselves may hold no pipe, device or socket.

A library waits for a pipe's writer and reads a device without end, and none of them looks first. Links are followed: a
hub's own store is made of them. Cost: one listing.
"""

from __future__ import annotations

import stat
from pathlib import Path

from shared.errors import ModelError

SPECIAL_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def refuse_special_files(directory: str | Path) -> None:
    """Refuse a model's, tokenizer's or adapter's directory that holds something else than files and directories.

    What is no directory (a hub id) passes.

    Raises:
        ModelError: the first such file is named.
    """
    for path in _entries(Path(directory)):
        try:
            found = SPECIAL_KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except OSError:  # a link that leads nowhere
            continue
        if found is not None:
            raise ModelError(f"{path} is {found} where a model has a regular file; put the file itself there")


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir()) if directory.is_dir() else []
    except (OSError, ValueError):  # not readable, or no path: whoever loads it says so
        return []

"""A bounded set of mapped parts, the first opened out first; safe between threads and across fork.

A look-up of an open part takes no lock. Opening takes one, which a forked child replaces, since another thread of its
parent may have held it. Evicted parts are unmapped when the last array cut from them is gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from shared.places import origin_of

MOST_OPEN_PARTS = 64
MOST_FETCHED_PARTS = 16
"""Of a mirror: a mapped part holds its place on disk, also when the store takes its name away."""

Part = TypeVar("Part")


class OpenParts(Generic[Part]):
    """Parts by number, opened on demand."""

    def __init__(self, directory: Path, open_part: Callable[[int], Part]) -> None:
        """Open parts of `directory`, each by `open_part(number)`; fewer at a time where it mirrors a URL."""
        self._open_part = open_part
        self._most = MOST_OPEN_PARTS if origin_of(directory) is None else MOST_FETCHED_PARTS
        self._parts: dict[int, Part] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def get(self, number: int) -> Part:
        """Return an open part, opening it first where needed."""
        part = self._parts.get(number)
        if part is not None:
            return part
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._pid = os.getpid()
        with self._lock:
            part = self._parts.get(number)
            if part is None:
                part = self._open_part(number)
                parts = dict(self._parts)
                while len(parts) >= self._most:
                    del parts[next(iter(parts))]
                parts[number] = part
                self._parts = parts  # replaced as a whole: readers without the lock see one state or the other
        return part

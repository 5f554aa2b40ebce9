"""Integers as byte planes: all low bytes, then all middle bytes, then all high bytes.

Bytes of one significance resemble each other, so an entropy coder does better on a plane than on interleaved integers.
Cost: one pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError


def split_planes(values: NDArray[Any], num_bytes: int) -> list[NDArray[np.uint8]]:
    """Return `num_bytes` planes of [n] non-negative integers, the low bytes first; higher bytes are dropped."""
    wide = np.ascontiguousarray(values, dtype="<u4" if num_bytes > 2 else "<u2")
    octets = wide.view(np.uint8).reshape(len(wide), wide.itemsize)
    return [np.ascontiguousarray(octets[:, i]) for i in range(num_bytes)]


class PlaneReader:
    """Takes integers off a row's planes, never beyond their end."""

    def __init__(self, content: bytes) -> None:
        """Start at the first plane of a decompressed row."""
        self._octets = np.frombuffer(content, dtype=np.uint8)
        self._at = 0

    def take(self, count: int, num_bytes: int) -> NDArray[np.int32]:
        """Return the next `count` integers of `num_bytes` planes.

        Raises:
            DamagedError: fewer bytes are left.
        """
        planes = self.take_octets(count * num_bytes).reshape(num_bytes, count)
        values = planes[0].astype(np.int32)
        for i in range(1, num_bytes):
            values |= planes[i].astype(np.int32) << (8 * i)
        return values

    def take_octets(self, count: int) -> NDArray[np.uint8]:
        """Return the next `count` bytes as they are.

        Raises:
            DamagedError: fewer bytes are left.
        """
        end = self._at + count
        if end > len(self._octets):
            raise DamagedError(f"the row's planes end after {len(self._octets)} bytes where {end} are needed")
        octets = self._octets[self._at : end]
        self._at = end
        return octets

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            DamagedError: bytes are left over.
        """
        if self._at != len(self._octets):
            raise DamagedError(f"the row's planes hold {len(self._octets)} bytes where {self._at} are explained")

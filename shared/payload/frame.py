"""Integers as byte planes, and one zstandard frame per row: content size in its header, checksum on, a block flush
after every plane.

Planes are all low bytes, then all middle bytes, then all high bytes: bytes of one significance resemble each other, so
an entropy coder does better on a plane than on interleaved integers. Cost: one pass.
The flush gives each plane entropy tables of its own, which is 5 % smaller than one block over planes of different
statistics. Before decompressing, the frame's header must name a content size within the caller's bound, and in
proportion to the frame's own bytes, so that no frame makes a reader allocate more. Compressors are not thread-safe,
so each thread keeps its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.schema import MAX_FRAME_FREE_BYTES, MAX_FRAME_RATIO

LEVEL = 1
_MAX_WINDOW_BYTES = 2**27

_local = threading.local()


def compress_planes(planes: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return one frame holding the planes' bytes one after another; an empty plane leaves no trace."""
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(
            level=LEVEL, write_checksum=True, write_content_size=True, write_dict_id=False
        )
    content_bytes = sum(len(plane) for plane in planes)
    frame = compressor.compressobj(size=content_bytes)
    chunks: list[bytes] = []
    for plane in planes:
        if len(plane):
            chunks.append(frame.compress(plane.data))
            chunks.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    chunks.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    blob = b"".join(chunks)
    if content_bytes > _most_content(len(blob)):
        raise ValueError(
            f"a row's {content_bytes:,} bytes compress to {len(blob):,}: they are all but constant, as no teacher's"
        )
    return blob


def _most_content(frame_bytes: int) -> int:
    return MAX_FRAME_FREE_BYTES + MAX_FRAME_RATIO * frame_bytes


def decompress_frame(blob: bytes | memoryview, max_bytes: int) -> bytes:
    """Return a frame's content after checking its checksum.

    Raises:
        DamagedError: not one whole frame with checksum and content size, or a content above `max_bytes`.
    """
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    try:
        header = zstandard.get_frame_parameters(blob)
        if not header.has_checksum or header.content_size == zstandard.CONTENTSIZE_UNKNOWN or header.dict_id:
            raise DamagedError("the frame has no checksum or no content size in its header")
        most = min(max_bytes, _most_content(len(blob)))
        if header.content_size > most:
            raise DamagedError(f"the frame claims {header.content_size} bytes where at most {most} are possible")
        content: bytes = decompressor.decompress(blob, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(f"the frame cannot be decompressed ({error})") from None
    if len(content) != header.content_size:
        raise DamagedError(f"the frame holds {len(content)} bytes where its header says {header.content_size}")
    return content


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

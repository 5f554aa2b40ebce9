"""One zstandard frame per row: content size in its header, checksum on, a block flush after every plane.

The flush gives each plane entropy tables of its own, which is 5 % smaller than one block over planes of different
statistics. Before decompressing, the frame's header must name a content size within the caller's bound, and in
proportion to the frame's own bytes, so that no frame makes a reader allocate more. Compressors are not thread-safe,
so each thread keeps its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

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

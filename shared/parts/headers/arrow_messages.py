"""What an Arrow IPC file or stream of strangers unpacks to, read from its headers before Arrow itself touches a byte.

Arrow decompresses a batch whole when it is read, so kilobytes can take gigabytes before anybody sees a row. Each
compressed buffer begins with the length that it claims, and that is what Arrow allocates: these are added up, message
by message. Layout: https://arrow.apache.org/docs/format/Columnar.html, sections "Encapsulated message format" and
"Compression". Cost: microseconds per message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from shared.parts.headers.flat_tables import INT32, INT64, OUTSIDE, FlatTables

_MAGIC = b"ARROW1\0\0"
_FILE_END = b"ARROW1"
_CONTINUATION = -1
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_PAIR = struct.Struct("<qq")


def stream_start(data: memoryview) -> int:
    """Return where the messages of a file begin: a file is a stream behind a magic word."""
    return len(_MAGIC) if bytes(data[: len(_MAGIC)]) == _MAGIC else 0


def unpacked_messages(data: memoryview) -> Iterator[tuple[int, int]]:
    """Yield (its bytes, bytes that its body claims to unpack to) of every message.

    Raises:
        ValueError: a message points outside the data, or the end is missing: what was cut between two messages reads as
            whole to Arrow.
    """
    tables, place, ended = FlatTables(data), stream_start(data), False
    try:
        while place + 4 <= len(data):
            words = 8 if tables.at(INT32, place) == _CONTINUATION else 4  # older writers have no continuation
            size = tables.at(INT32, place + words - 4)
            ended = size == 0
            if ended:
                break
            body = place + words + size
            message = place + words + tables.at(INT32, place + words)
            length = tables.field(message, 3)
            body_bytes = tables.at(INT64, length) if length else 0
            if size < 0 or not 0 <= body_bytes <= len(data) - body:
                raise struct.error
            yield words + size + body_bytes, _unpacked(tables, message, body, body_bytes)
            place = body + body_bytes
    except OUTSIDE:
        raise ValueError("one of its messages points outside the file") from None
    if not ended or (stream_start(data) and bytes(data[-len(_FILE_END) :]) != _FILE_END):
        raise ValueError("it ends in the middle; get it again")


def _unpacked(tables: FlatTables, message: int, body: int, body_bytes: int) -> int:
    """Return the bytes that Arrow makes of a message's body."""
    kind = tables.field(message, 1)
    kind_number = tables.data[kind] if kind else 0
    batch = tables.table(message, 2)
    if batch is not None and kind_number == _DICTIONARY_BATCH:
        batch = tables.table(batch, 1)
    if batch is None or kind_number not in (_DICTIONARY_BATCH, _RECORD_BATCH) or tables.field(batch, 3) is None:
        return body_bytes
    first, count = tables.vector(batch, 2)
    total = 0
    for i in range(count):
        offset, length = tables.unpack(_PAIR, first + i * _PAIR.size)
        if length and not 0 <= offset <= offset + length <= body_bytes:
            raise struct.error
        total += max(tables.at(INT64, body + offset), length) if length else 0  # -1: stored as it is
    return total

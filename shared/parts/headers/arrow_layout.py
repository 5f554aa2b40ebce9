"""How an Arrow IPC file is laid out, read from its footer and message headers before Arrow itself touches a byte.

Arrow decompresses buffers when a batch is read, so a file of kilobytes can take gigabytes before anybody sees the
result. Its headers say so: they are flatbuffers (tables whose fields are found by offsets), and the few fields that
matter are taken from them here, each look-up within the file. Blocks must follow one another without a gap, from the
schema to the footer, so that none can be left out. Layout: https://arrow.apache.org/docs/format/Columnar.html,
sections "IPC File Format" and "Encapsulated message format". Cost: microseconds per batch; nothing is allocated by
what the file claims.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from shared.errors import DamagedError
from shared.parts.headers.flat_tables import INT32, INT64, OUTSIDE, FlatTables

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_END_OF_STREAM = _CONTINUATION + bytes(4)
_RECORD_BATCH = 3
_BLOCK = struct.Struct("<qi4xq")
_PAIR = struct.Struct("<qq")


@dataclass(frozen=True, slots=True)
class _Block:
    """Where a record batch lies."""

    offset: int
    header_bytes: int
    body_bytes: int


class ArrowLayout(FlatTables):
    """Blocks of one Arrow IPC file."""

    def __init__(self, data: memoryview) -> None:
        """Read the footer of a whole file, mapped.

        Raises:
            DamagedError: it is no Arrow IPC file, has dictionaries, or its blocks do not fill it from schema to footer.
        """
        super().__init__(data)
        try:
            self.blocks = list(self._read_footer())
        except OUTSIDE:
            raise DamagedError("its footer points outside the file") from None

    def check_batch(self, number: int, schema: pa.Schema) -> int:
        """Check the header of a record batch; return its rows.

        Raises:
            DamagedError: it is compressed, has nulls in a column without them, or its buffers do not lie in its body.
        """
        try:
            return self._check_batch(self.blocks[number], schema)
        except OUTSIDE:
            raise DamagedError(f"the header of record batch {number} points outside the file") from None

    def _read_footer(self) -> Iterator[_Block]:
        data = self.data
        if len(data) < 32 or data[:6] != _MAGIC or data[-6:] != _MAGIC:
            raise DamagedError("it does not begin and end as an Arrow file")
        size = self.at(INT32, len(data) - 10)
        start = len(data) - 10 - size
        if not 0 < size <= len(data) - 24:
            raise DamagedError(f"its footer claims {size} bytes of {len(data)}")
        root = start + self.at(INT32, start)
        if self.vector(root, 2)[1]:
            raise DamagedError("it has dictionaries where a cache has none")
        first, count = self.vector(root, 3)
        if count > (len(data) - first) // _BLOCK.size:
            raise DamagedError(f"its footer claims {count} record batches")
        end = 16 + self.at(INT32, 12)
        for i in range(count):
            block = _Block(*self.unpack(_BLOCK, first + i * _BLOCK.size))
            if block.offset != end or block.header_bytes < 16 or block.body_bytes < 0:
                raise DamagedError(f"record batch {i} lies at {block.offset} where {end} is expected")
            end += block.header_bytes + block.body_bytes
            yield block
        if bytes(data[end:start]) not in (b"", _END_OF_STREAM):
            raise DamagedError(f"its record batches end at {end} where its footer starts at {start}")

    def _check_batch(self, block: _Block, schema: pa.Schema) -> int:
        start = block.offset
        if self.data[start : start + 4] != _CONTINUATION or self.at(INT32, start + 4) != block.header_bytes - 8:
            raise DamagedError(f"no message of {block.header_bytes} bytes starts at {start}")
        message = start + 8 + self.at(INT32, start + 8)
        kind, header, body = (self.field(message, i) for i in (1, 2, 3))
        body_bytes = self.at(INT64, body) if body else 0
        if not kind or not header or self.data[kind] != _RECORD_BATCH or body_bytes != block.body_bytes:
            raise DamagedError(f"the message at {start} is no record batch of {block.body_bytes} bytes")
        batch = header + self.at(INT32, header)
        if self.field(batch, 3):
            raise DamagedError("it is compressed inside where a part is stored plain")
        length = self.field(batch, 0)
        rows = self.at(INT64, length) if length else 0
        self._check_nodes(batch, rows, schema)
        self._check_buffers(batch, body_bytes)
        return rows

    def _check_nodes(self, batch: int, rows: int, schema: pa.Schema) -> None:
        """Compare lengths and null counts with the schema's fields, children included."""
        names = [entry for field in schema for entry in _flattened(field, field.name, 0)]
        first, count = self.vector(batch, 1)
        if count != len(names):
            raise DamagedError(f"it has {count} columns and children where its schema has {len(names)}")
        for i, (name, nullable, depth) in enumerate(names):
            length, nulls = self.unpack(_PAIR, first + i * _PAIR.size)
            if length < 0 or (depth == 0 and length != rows):
                raise DamagedError(f"its column {name} has {length} values in {rows} rows")
            if nulls and not nullable:
                raise DamagedError(f"its column {name} has {nulls} nulls where the format allows none")

    def _check_buffers(self, batch: int, body_bytes: int) -> None:
        first, count = self.vector(batch, 2)
        end = 0
        for i in range(min(count, 1024)):
            offset, length = self.unpack(_PAIR, first + i * _PAIR.size)
            if offset < end or length < 0 or offset + length > body_bytes:
                raise DamagedError(f"its buffer {i} lies at [{offset}, {offset + length}) of {body_bytes} bytes")
            end = offset + length


def _flattened(field: pa.Field, name: str, depth: int) -> Iterator[tuple[str, bool, int]]:
    """Yield name, whether nulls are allowed, and depth of a field and of what its lists hold, in Arrow's order."""
    yield name, field.nullable, depth
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        yield from _flattened(field.type.value_field, name, depth + 1)

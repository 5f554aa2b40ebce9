"""Look-ups in flatbuffers: tables whose fields are found by offsets, each of which may point anywhere.

Every look-up stays within the data or raises `OUTSIDE`; nothing is allocated by what an offset claims.
"""

from __future__ import annotations

import struct

OUTSIDE = (struct.error, IndexError, OverflowError)
"""What a look-up raises that leaves the data."""
INT32, UINT16, INT64 = struct.Struct("<i"), struct.Struct("<H"), struct.Struct("<q")


class FlatTables:
    """Bytes that hold flatbuffers."""

    def __init__(self, data: memoryview) -> None:
        """Take the bytes, mapped."""
        self.data = data.cast("B")

    def at(self, kind: struct.Struct, place: int) -> int:
        """Return one number."""
        return int(self.unpack(kind, place)[0])

    def unpack(self, kind: struct.Struct, place: int) -> tuple[int, ...]:
        """Return the numbers of a struct."""
        if place < 0:  # counts from the end for struct
            raise struct.error
        return kind.unpack_from(self.data, place)

    def field(self, table: int, index: int) -> int | None:
        """Return where a table's field lies; None where it has its default."""
        vtable = table - self.at(INT32, table)
        if 4 + 2 * index >= self.at(UINT16, vtable):
            return None
        offset = self.at(UINT16, vtable + 4 + 2 * index)
        return table + offset if offset else None

    def table(self, table: int, index: int) -> int | None:
        """Return where a table lies that a field names; None where there is none."""
        field = self.field(table, index)
        return None if field is None else field + self.at(INT32, field)

    def vector(self, table: int, index: int) -> tuple[int, int]:
        """Return where a vector's first item lies, and how many it has."""
        start = self.table(table, index)
        if start is None:
            return 0, 0
        return start + 4, max(0, self.at(INT32, start))

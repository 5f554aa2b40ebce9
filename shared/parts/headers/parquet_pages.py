"""What a Parquet file of strangers unpacks to, by the headers of its pages.

The footer's sizes are for planning; a reader decompresses what each page's own header says, and makes as many values as
it says: a page of one repeated number takes a few bytes whatever its count. So the pages are walked, header by header,
and a chunk that two columns share counts twice, as it is read twice. A header is a struct of Thrift's compact protocol:
https://github.com/apache/parquet-format, https://github.com/apache/thrift/blob/master/doc/specs/.
Cost: some 20 microseconds per page, of which there is about one per megabyte; nothing is unpacked.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow.parquet as pq

VALUE_BYTES = 4
"""A value counts at least so much, however it is packed."""
_MOST_HEADER_BYTES = 2**24
_MOST_DEPTH = 8
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_UNCOMPRESSED, _COMPRESSED = 2, 3
_DATA, _DICTIONARY, _DATA_2 = 5, 7, 8
"""Fields of a page's header; the last three are structs whose first field counts values."""


def unpacked_bytes(file: BinaryIO, metadata: pq.FileMetaData) -> int:
    """Return the bytes that all columns of a file unpack to; `metadata` is that of its footer.

    Raises:
        ValueError: a page's header is none, or lies outside its column.
    """
    end, total = file.seek(0, 2), 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.num_values == 0:  # no page is read, and its place may be anywhere
                continue
            schema = metadata.schema.column(column)
            fixed = schema.length if schema.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
            total += _chunk_bytes(file, chunk, max(fixed, VALUE_BYTES), end)
    return total


def _chunk_bytes(file: BinaryIO, chunk: Any, value_bytes: int, end: int) -> int:
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    stop, total = place + chunk.total_compressed_size, 0
    if not 0 <= place <= stop <= end:
        raise ValueError(f"its column {chunk.path_in_schema} lies outside the file")
    while place < stop:
        fields, size = _header(file, place, stop)
        unpacked, packed = fields.get(_UNCOMPRESSED, -1), fields.get(_COMPRESSED, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError(f"a page of its column {chunk.path_in_schema} has no size")
        values = max(fields.get(kind, 0) for kind in (_DATA, _DICTIONARY, _DATA_2))
        total += max(unpacked, value_bytes * values)
        place += size + packed
    return total


def _header(file: BinaryIO, place: int, stop: int) -> tuple[dict[int, int], int]:
    """Return a page header's numbers, of a struct its first, and the header's size."""
    window = 2**10
    while True:
        file.seek(place)
        data = file.read(min(window, stop - place))
        try:
            reader = _Compact(data)
            return reader.struct(0), reader.place
        except IndexError:
            if len(data) < window or window >= _MOST_HEADER_BYTES:
                raise ValueError("the header of one of its pages does not end") from None
            window *= 16


class _Compact:
    """A reader of Thrift's compact protocol that keeps numbers and passes over the rest."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int) -> dict[int, int]:
        """Return the number of each field, of a struct that of its first field."""
        if depth > _MOST_DEPTH:
            raise ValueError("the header of one of its pages is nested without end")
        found: dict[int, int] = {}
        name = 0
        while head := self._byte():
            name = name + (head >> 4) if head >> 4 else self._number()
            found[name] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int, inside_list: bool = False) -> int:
        if kind in (_TRUE, _FALSE):
            return self._byte() if inside_list else 0
        if kind == _BYTE:
            return self._byte()
        if kind < _DOUBLE:
            return self._number()
        if kind == _STRUCT:
            return self.struct(depth + 1).get(1, 0)
        if kind in (_LIST, _SET):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._value(head & 15, depth + 1, inside_list=True)
            return 0
        if kind not in (_DOUBLE, _BINARY):
            raise ValueError(f"the header of one of its pages has a field of the unknown kind {kind}")
        size = 8 if kind == _DOUBLE else self._varint()  # which moves the place itself
        self.place += size
        if self.place > len(self.data):
            raise IndexError
        return 0

    def _byte(self) -> int:
        found = self.data[self.place]
        self.place += 1
        return found

    def _varint(self) -> int:
        found = shift = 0
        while True:
            byte = self._byte()
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found
            if shift > 63:
                raise ValueError("the header of one of its pages has a number without end")

    def _number(self) -> int:
        found = self._varint()
        return (found >> 1) ^ -(found & 1)

"""Rows of Parquet and Arrow files, bounded before anything is unpacked.

A table may hold a text once and name it in a million rows, a page of one number repeated without end, or a compressed
batch of any size. So what pages and messages unpack to is added up first, from their headers; texts stay in their
dictionaries as long as they are columns; and rows are made a few at a time, as many as fit `ROW_BYTES`, whose size is
counted before.
Columns are read as `datasets` reads them, whose features a file may name (objects as JSON texts, say); images and sound
stay bytes. Cost: one pass; memory for a page of each column (a batch, for Arrow) and for `ROW_BYTES` of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.parts.cache_files import arrow_name
from shared.parts.headers.arrow_messages import stream_start, unpacked_messages
from shared.parts.headers.parquet_pages import unpacked_bytes
from teacher_cache.prompts.files.packed_files import FREE_BYTES, MAX_RATIO

ROW_BYTES = 2**26
"""Most that a row may take, and that rows take which are made at once."""
MAX_TABLE_RATIO = 256
"""Columns may unpack to so many bytes for each of the file's own beyond the free ones; real ones make 2 to 20."""
_BATCH_ROWS = 64
_VALUE_BYTES = 8
"""A value counts at least so much, which is what it takes in a list."""

_WAY_OUT = "write its rows as JSON lines if they are meant"

Row = dict[str, Any] | ValueError


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or a ValueError in place of one that is too large.

    Raises:
        ValueError: it would unpack to far more than its size, or its pages contradict themselves.
        pa.ArrowException: it is no Parquet file.
    """
    with path.open("rb") as file:
        metadata = pq.read_metadata(file)
        most = _most_bytes(path)
        unpacked = unpacked_bytes(file, metadata)
        if unpacked > most:
            raise ValueError(_sentence(unpacked, most))
        columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        schema = metadata.schema.to_arrow_schema()
        with pa.OSFile(arrow_name(path)) as native, pq.ParquetFile(native, read_dictionary=texts) as opened:
            yield from _rows(opened.iter_batches(_BATCH_ROWS), schema, path)


def arrow_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream; errors as for `parquet_rows`."""
    with pa.memory_map(arrow_name(path)) as source:
        data = source.read_buffer()
        most, unpacked = _most_bytes(path), 0
        for own, claimed in unpacked_messages(memoryview(data)):
            unpacked += claimed
            if claimed > FREE_BYTES + MAX_TABLE_RATIO * own or unpacked > most:
                raise ValueError(_sentence(unpacked, most))
        with pa.ipc.open_stream(data.slice(stream_start(memoryview(data)))) as batches:
            yield from _rows(_validated(batches), batches.schema, path)


def _sentence(unpacked: int, most: int) -> str:
    return f"it claims to unpack to {unpacked:,} bytes, and at most {most:,} are taken of its size; {_WAY_OUT}"


def _most_bytes(path: Path) -> int:
    return FREE_BYTES + MAX_TABLE_RATIO * path.stat().st_size


def _validated(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield batches a few rows at a time, whose offsets lie within their columns."""
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


def _rows(batches: Iterator[pa.RecordBatch], schema: pa.Schema, path: Path) -> Iterator[Row]:
    import datasets
    from datasets.table import table_cast

    plain = pa.schema([field.with_type(_plain(field.type)) for field in schema], schema.metadata)
    features = datasets.Features({name: _kept(of) for name, of in datasets.Features.from_arrow_schema(plain).items()})
    total, most = 0, FREE_BYTES + MAX_RATIO * path.stat().st_size
    for batch in batches:
        for piece, size in _pieces(batch):
            if size > ROW_BYTES:
                yield ValueError(f"the row takes {size:,} bytes; at most {ROW_BYTES:,} are read")
                continue
            total += size
            if total > most:
                raise ValueError(
                    f"its rows unpack to more than {MAX_RATIO:,} times its size, as no rows do; {_WAY_OUT}"
                )
            arrays = [column.cast(field.type) for column, field in zip(piece.columns, plain, strict=True)]
            table = table_cast(pa.Table.from_arrays(arrays, schema=plain), features.arrow_schema)
            yield from map(features.decode_example, table.to_pylist())


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yield parts of a batch whose rows take at most `ROW_BYTES`, or one row, with what they take."""
    size = sum(map(_decoded_bytes, batch.columns))
    if size <= ROW_BYTES or batch.num_rows == 1:
        yield batch, size
        return
    half = batch.num_rows // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))


def _decoded_bytes(column: pa.Array) -> int:
    """Return about how many bytes the values of a column take once each stands by itself.

    Raises:
        ValueError: it is of a type that is not read.
    """
    kind, own = column.type, _VALUE_BYTES * len(column)
    if isinstance(column, pa.ExtensionArray):
        return _decoded_bytes(column.storage)
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return own + int(pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _is_text(kind):
        return own + int(pc.sum(pc.binary_length(column)).as_py() or 0)
    if pa.types.is_struct(column.type):
        return own + sum(map(_decoded_bytes, column.flatten()))
    if _is_list(column.type):
        return own + _decoded_bytes(column.flatten())
    if not _is_flat(kind):
        raise ValueError(f"it has a column of the type {str(kind)[:60]}, which is not read; write it as a plain one")
    return max(own, len(column) * (kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0))


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_flat(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_fixed_size_binary(kind)) or bool(
        pa.types.is_decimal(kind)
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return a type without dictionaries."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _kept(feature: Any) -> Any:
    """Return a feature of `datasets` whose images, sound and other media stay the bytes that they are."""
    if isinstance(feature, dict):
        return {name: _kept(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_kept(inner) for inner in feature]
    if not is_dataclass(feature) or isinstance(feature, type):
        return feature
    names = {field.name for field in fields(feature)}
    if "feature" in names:
        return replace(feature, feature=_kept(vars(feature)["feature"]))
    return replace(feature, decode=False) if "decode" in names and type(feature).__name__ != "Json" else feature

"""Rows of foreign Parquet files, a few at a time, with their nested lists as flat arrays.

Sizes are looked at before anything is unpacked; columns that are not asked for are not read. Cost: one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import CacheError, DamagedError, first_line
from shared.parts.cache_files import list_folder, open_regular
from shared.schema import MAX_ENTRIES_PER_ROW
from tools.cache.parquet_columns import Lists
from tools.cache.parquet_import import check_unpacked

_BATCH_BYTES = 2**26
_MOST_ROWS = 256


def parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files of a directory by name, or the one file.

    Raises:
        CacheError: there is none.
    """
    files = (
        [path]
        if path.suffix == ".parquet"
        else [path / name for name in list_folder(path) if name.endswith(".parquet")]
    )
    if not files:
        raise CacheError(
            f"{path} holds no *.parquet files; a data set saved by `datasets` becomes one with "
            "load_from_disk(DIR).to_parquet(FILE)"
        )
    return files


def parquet_columns(files: Sequence[Path]) -> list[str]:
    """Return the columns of the first file."""
    try:
        with open_regular(files[0]) as source:
            return list(pq.read_schema(source).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"{files[0]} is no Parquet file ({first_line(error)})") from None


def parquet_rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Lists], int]]:
    """Yield (place, lists by column, row within them) of every row.

    Raises:
        DamagedError: a file lacks a column, holds a null, or would unpack to far more than its bytes.
    """
    for file in files:
        try:
            yield from _rows_of(file, columns)
        except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
            raise DamagedError(f"{file} cannot be imported: {first_line(error)}") from None


def _rows_of(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Lists], int]]:
    with open_regular(file) as source, pq.ParquetFile(source) as opened:
        size = check_unpacked(file, opened, os.fstat(source.fileno()).st_size)
        missing = [name for name in columns if name not in opened.schema_arrow.names]
        if missing:
            raise DamagedError(f"{file} has no column {missing[0]}; expected {', '.join(columns)}")
        at_once = max(1, min(_MOST_ROWS, _BATCH_BYTES * max(opened.metadata.num_rows, 1) // max(size, 1)))
        number = 0
        for batch in opened.iter_batches(at_once, columns=list(columns)):
            lists = {name: Lists(_plain(batch.column(name))) for name in columns}
            for i in range(batch.num_rows):
                yield f"{file}:{number}", lists, i
                number += 1


def _plain(column: pa.Array) -> pa.Array:
    """Return lists of any kind as plain ones."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_list(kind.value_type):
        return column
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"a column is {kind} where lists are expected")
    inner = kind.value_type
    if hasattr(inner, "value_type"):
        return column.cast(pa.list_(pa.list_(inner.value_type)))
    return column.cast(pa.list_(inner))


def grid(lists: Lists, i: int, where: str, name: str) -> np.ndarray:
    """Return the inner lists of row i as a rectangle.

    Raises:
        DamagedError: they differ in length.
    """
    counts = lists.counts(i)
    if len(counts) and int(counts.min()) != int(counts.max()):
        raise DamagedError(f"{where} has lists of {counts.min()} to {counts.max()} in {name}; expected one length")
    return np.asarray(lists.values(i)).reshape(len(counts), int(counts[0]) if len(counts) else 0)


def widest(files: Sequence[Path], column: str) -> int:
    """Return the length of the longest inner list of a column. Cost: reads that column."""
    longest = 0
    for _, lists, i in parquet_rows(files, [column]):
        counts = lists[column].counts(i)
        longest = max(longest, int(counts.max(initial=0)))
    return longest


def ragged(lists: Lists, values: Lists, i: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and log-probabilities of row i as rectangles; -1 and -inf where a position has fewer entries.

    Raises:
        DamagedError: the two differ in length.
    """
    counts = lists.counts(i)
    if not np.array_equal(counts, values.counts(i)):
        raise DamagedError(f"{where} has positions with more ids than values, or fewer")
    if len(counts) * int(counts.max(initial=0)) > MAX_ENTRIES_PER_ROW:
        raise DamagedError(f"{where} has {len(counts):,} positions of up to {counts.max():,} entries; too many")
    filled = np.arange(int(counts.max(initial=0))) < counts[:, None]
    ids, logprobs = np.full(filled.shape, -1, np.int64), np.full(filled.shape, -np.inf)
    ids[filled], logprobs[filled] = lists.values(i), values.values(i)
    return ids, logprobs

"""Rows of foreign Parquet files, a few at a time, with their nested lists as flat arrays.

Sizes are looked at before anything is unpacked; columns that are not asked for are not read. Cost: one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DamagedError, NamingError, first_line
from shared.parts.cache_files import list_folder, open_regular
from shared.text.file_endings import ends_in
from tools.cache.foreign.foreign_row import check_entries
from tools.cache.parquet_columns import Lists, lists_in
from tools.cache.parquet_import import check_unpacked

_BATCH_BYTES = 2**26
_MOST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """What the lists of a column hold."""

    depth: int
    """1: a list per row; 2: a list per position of a row."""
    takes: Callable[[pa.DataType], bool]
    """Tells whether values of a type are taken: nothing is rounded to what is expected."""
    words: str


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_flag(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or _is_number(kind))


IDS = Kind(1, pa.types.is_integer, "lists of whole numbers")
ENTRY_IDS = Kind(2, pa.types.is_integer, "lists of lists of whole numbers")
ENTRY_NUMBERS = Kind(2, _is_number, "lists of lists of numbers")
ENTRY_FLAGS = Kind(2, _is_flag, "lists of lists of flags")


def parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files of a directory by name, or the one file.

    Raises:
        CacheError: there is none.
    """
    files = [path / name for name in list_folder(path) if ends_in(name, ".parquet")] if path.is_dir() else [path]
    if not files:
        raise NamingError(
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


def parquet_rows(files: Sequence[Path], columns: Mapping[str, Kind]) -> Iterator[tuple[str, Mapping[str, Lists], int]]:
    """Yield (place, lists by column, row within them) of every row.

    Raises:
        DamagedError: a file lacks a column or has one of another kind, holds a null, or would unpack to far more than
            its bytes.
    """
    for file in files:
        try:
            yield from _rows_of(file, columns)
        except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
            raise DamagedError(f"{file} cannot be imported: {first_line(error)}") from None


def _rows_of(file: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[str, Mapping[str, Lists], int]]:
    with open_regular(file) as source, pq.ParquetFile(source) as opened:
        size = check_unpacked(file, source, opened)
        for name, kind in columns.items():
            _check_kind(file, opened.schema_arrow, name, kind)
        at_once = max(1, min(_MOST_ROWS, _BATCH_BYTES * max(opened.metadata.num_rows, 1) // max(size, 1)))
        number = 0
        for batch in opened.iter_batches(at_once, columns=list(columns)):
            lists = {name: Lists(_plain(batch.column(name))) for name in columns}
            for i in range(batch.num_rows):
                yield f"{file}:{number}", lists, i
                number += 1


def _check_kind(file: Path, schema: pa.Schema, name: str, wanted: Kind) -> None:
    """Refuse a column by its type, before it is read: texts in a dictionary unpack to any size."""
    if schema.names.count(name) != 1:
        found = "no column" if name not in schema.names else "more than one column"
        raise DamagedError(f"{file} has {found} {name}; expected {wanted.words} there")
    kind = schema.field(name).type
    depth, values = lists_in(kind)
    if depth != wanted.depth or not wanted.takes(values):
        raise DamagedError(f"{file} has a column {name} of {str(kind)[:80]}; expected {wanted.words}")


def _plain(column: pa.Array) -> pa.Array:
    """Return lists of any kind as plain ones."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_list(kind.value_type):
        return column
    depth, values = lists_in(kind)
    return column.cast(pa.list_(values) if depth == 1 else pa.list_(pa.list_(values)))


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
    for _, lists, i in parquet_rows(files, {column: ENTRY_IDS}):
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
    check_entries(len(counts), int(counts.max(initial=0)), where)
    filled = np.arange(int(counts.max(initial=0))) < counts[:, None]
    ids, logprobs = np.full(filled.shape, -1, np.int64), np.full(filled.shape, -np.inf)
    ids[filled], logprobs[filled] = lists.values(i), values.values(i)
    return ids, logprobs

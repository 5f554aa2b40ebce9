"""Four values per row of a sequences part, without its tokens and texts: all that planning an order needs.

From the mapped part where the cache is a directory. Of a mirror they are kept beside its records once the part was
here, so that a plan does not fetch the rows' parts a second time. Cost: 40 bytes per row; on a mirror, each rows' part
once, several at a time.

Shape letters: R rows of the part.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.atomic import fill_atomic, make_dir
from shared.parts.mapped_part import MappedSequences
from shared.parts.records import PartRecord
from shared.places import origin_of
from shared.remote.transfer import PARALLEL


class PartColumns(NamedTuple):
    """Values of the rows of one part."""

    num_tokens: NDArray[np.int32]
    """[R]"""
    group_keys: NDArray[np.uint8]
    """[R, 16]"""
    row_keys: NDArray[np.uint8]
    """[R, 16]"""
    codes: NDArray[np.int32]
    """[R] indices of `names`."""
    names: NDArray[np.str_]
    """Sources of the part."""


def part_columns(directory: Path, records: Sequence[PartRecord]) -> Iterator[PartColumns]:
    """Yield the columns of committed parts of `sequences/`, in order.

    Raises:
        DamagedError: a part is not what was committed.
    """
    if origin_of(directory) is None:
        yield from (_read(directory, record) for record in records)
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(lambda record: _kept(directory, record), records)


def _read(directory: Path, record: PartRecord) -> PartColumns:
    part = MappedSequences(directory, record, verify=False)
    codes, names = part.sources()
    return PartColumns(part.num_tokens(), part.group_keys, part.row_keys, codes, np.asarray(names, np.str_))


def _kept(directory: Path, record: PartRecord) -> PartColumns:
    path = directory.parent / "columns" / f"{record.xxh3}.npz"
    # what is not kept yet, or what this disk forgot, is made again from the part, which is checked, and replaces it
    unkept = suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with unkept, np.load(path, allow_pickle=False) as found:
        return PartColumns(*(found[name] for name in PartColumns._fields))
    columns = _read(directory, record)
    make_dir(path.parent)
    fill_atomic(path, lambda file: np.savez(file, **columns._asdict()), "columns", 40 * record.rows)
    return columns

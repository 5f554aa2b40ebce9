"""Which rows of a list of parts repeat a row_key that an earlier row holds.

Algorithm: keys are hashes, so their leading bits cut them into equal shares; one pass per share gathers its keys from
    the mapped row_key columns, sorts them stably and marks every key but the first of its equals. Cost: 16 bytes of
    reading per row and pass. Memory: some 64 bytes for each of the `most_keys` keys of a pass (0.5 GB), and one byte
    per row of the parts that repeat something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.parts.jobs import key_column
from shared.parts.parts import open_part
from shared.parts.records import PartRecord

MOST_KEYS = 2**23
_ROW_BITS = 17
"""Enough for the most rows of a part."""


def repeated_rows(parts: Sequence[tuple[Path, PartRecord]], most_keys: int = MOST_KEYS) -> dict[int, NDArray[np.bool_]]:
    """Return, for each part that repeats rows of earlier ones or its own, its index and a mask [rows] of the repeats.

    Args:
        parts: directory and record of sequences parts, in the order that decides which of equal rows comes first.
        most_keys: keys in memory at a time.

    Raises:
        DamagedError: a part contradicts its record.
    """
    total = sum(record.rows for _, record in parts)
    bits = max(0, -(-total // most_keys) - 1).bit_length()
    repeats: dict[int, NDArray[np.bool_]] = {}
    for share in range(2**bits):
        for place in _repeats_of_share(parts, share, bits).tolist():
            part, row = place >> _ROW_BITS, place & (2**_ROW_BITS - 1)
            mask = repeats.get(part)
            if mask is None:
                mask = repeats[part] = np.zeros(parts[part][1].rows, np.bool_)
            mask[row] = True
    return repeats


def _repeats_of_share(parts: Sequence[tuple[Path, PartRecord]], share: int, bits: int) -> NDArray[np.int64]:
    """Return part << 17 | row of each repeated row whose key starts with the `bits` bits of `share`."""
    places, highs, lows = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for number, (directory, record) in enumerate(parts):
        if not record.rows:
            continue
        words = (
            np.ascontiguousarray(key_column(open_part(directory, record, verify=False), "row_key"))
            .view(">u8")
            .astype(np.uint64)
        )
        rows = np.arange(len(words)) if bits == 0 else np.flatnonzero(words[:, 0] >> np.uint64(64 - bits) == share)
        places.append(rows.astype(np.int64) | (number << _ROW_BITS))
        highs.append(words[rows, 0])
        lows.append(words[rows, 1])
    high, low = np.concatenate(highs), np.concatenate(lows)
    order = np.lexsort((low, high))  # stable, so equal keys stay in the order of the parts
    high, low = high[order], low[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    repeats: NDArray[np.int64] = np.concatenate(places)[order[1:][same]]
    return repeats

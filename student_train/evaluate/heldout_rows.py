"""Which held-out rows are measured: always the same ones, whatever the order on disk.

Rows of the smallest group keys are a random sample of the prompts, since keys are hashes. Cost: one hash comparison per
row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.keys import is_heldout


def heldout_rows(
    caches: Sequence[Cache], fraction: float, max_rows: int | None, left_out: NDArray[np.bool_] | None = None
) -> list[tuple[int, int]]:
    """Return (cache, row) of held-out rows; with `max_rows` those of the smallest group keys, whichever the order on
    disk; without the rows that `left_out` [R] marks (shared/cache/rows_left_out.py).
    """
    return [(index, row) for _, index, row in _by_key(caches, fraction, left_out)[:max_rows]]


def heldout_rows_per_source(
    caches: Sequence[Cache], fraction: float, max_rows: int, left_out: NDArray[np.bool_] | None = None
) -> dict[str, list[tuple[int, int]]]:
    """Return (cache, row) of at most `max_rows` held-out rows of each source, smallest group keys first, without those
    that `left_out` [R] marks; sources by name.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    names, codes = [cache.source_names for cache in caches], [cache.sources for cache in caches]
    for _, index, row in _by_key(caches, fraction, left_out):
        rows = found.setdefault(names[index][int(codes[index][row])], [])
        if len(rows) < max_rows:
            rows.append((index, row))
    return dict(sorted(found.items()))


def _by_key(
    caches: Sequence[Cache], fraction: float, left_out: NDArray[np.bool_] | None
) -> list[tuple[bytes, int, int]]:
    starts = np.cumsum([0, *map(len, caches)])
    return sorted(
        (bytes(key), index, row)
        for index, cache in enumerate(caches)
        for row, key in enumerate(cache.group_keys)
        if is_heldout(bytes(key), fraction) and (left_out is None or not left_out[starts[index] + row])
    )

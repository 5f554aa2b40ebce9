"""Which held-out rows are measured: always the same ones, whatever the order on disk.

Rows of the smallest group keys are a random sample of the prompts, since keys are hashes. Cost: one hash comparison per
row.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.cache.cache import Cache
from shared.keys import is_heldout


def heldout_rows(caches: Sequence[Cache], fraction: float, max_rows: int | None) -> list[tuple[int, int]]:
    """Return (cache, row) of held-out rows; with `max_rows` those of the smallest group keys, whichever the order on
    disk.
    """
    return [(index, row) for _, index, row in _by_key(caches, fraction)[:max_rows]]


def heldout_rows_per_source(
    caches: Sequence[Cache], fraction: float, max_rows: int
) -> dict[str, list[tuple[int, int]]]:
    """Return (cache, row) of at most `max_rows` held-out rows of each source, smallest group keys first; sources by
    name.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    names, codes = [cache.source_names for cache in caches], [cache.sources for cache in caches]
    for _, index, row in _by_key(caches, fraction):
        rows = found.setdefault(names[index][int(codes[index][row])], [])
        if len(rows) < max_rows:
            rows.append((index, row))
    return dict(sorted(found.items()))


def _by_key(caches: Sequence[Cache], fraction: float) -> list[tuple[bytes, int, int]]:
    return sorted(
        (bytes(key), index, row)
        for index, cache in enumerate(caches)
        for row, key in enumerate(cache.group_keys)
        if is_heldout(bytes(key), fraction)
    )

"""With which end tokens do a cache's answers end? What a student of it learns to write, and must stop at.

Read from the rows themselves, so it holds for merged and imported caches too: the last token of each supervised span,
where it is a special token. An answer cut by length has none, whichever token it was cut after: the end of thoughts,
say, at which every student would stop.
Cost: at most `ROWS_PER_SOURCE` rows of each source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from shared.cache.cache import Cache

ROWS_PER_SOURCE = 64
"""Spread evenly over the source: all rows of one source end alike, but for those that were cut."""


def trained_ends(cache: Cache, special_ids: Collection[int]) -> tuple[int, ...]:
    """Return the special tokens that answers end with, the most frequent first.

    Rows [.., 7, 2], [.., 5, 2] and a cut one [.., 9], 2 being special, give (2,).
    """
    found: Counter[int] = Counter()
    for source in np.unique(cache.sources):
        rows = np.flatnonzero(cache.sources == source)
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, ROWS_PER_SOURCE).astype(np.int64))]:
            sequence = cache.sequence(int(row))
            whole = sequence.spans[:-1] if sequence.finish_reason == "length" else sequence.spans
            lasts = sequence.token_ids[whole[:, 1] - 1].tolist()
            found.update(int(token) for token in lasts if token in special_ids)
    return tuple(token for token, _ in found.most_common())

"""Checks of ragged supports: no token id twice within a position.

A repeated id would make a fused loss overwrite one gradient by another in silence, so both ends of the codec refuse it.
Cost: one sort of the ids within each position (40 nanoseconds per position of 64 entries).

Shape letters: S positions, N head entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.payload.ragged import position_of, starts_of, uniform_count
from shared.payload.targets import Draws


def has_repeated_id(counts: NDArray[np.int32], ids: NDArray[np.int32], draws: Sequence[Draws] = ()) -> bool:
    """Tell whether a position names an id twice in its head, or in its head and the draws of one
    temperature together.
    """
    count = uniform_count(counts)
    if not draws:
        if len(ids) == 0:
            return False
        if count:
            ordered = np.sort(ids.reshape(len(counts), count), axis=1)
            return bool((ordered[:, 1:] == ordered[:, :-1]).any())
        return _has_repeat(_tagged(counts, ids))
    head = _tagged(counts, ids)
    return any(_has_repeat(np.concatenate([head, _tagged(drawn.counts, drawn.ids)])) for drawn in draws)


def is_ascending(counts: NDArray[np.int32], ids: NDArray[np.int32]) -> bool:
    """Tell whether the ids ascend strictly within every position."""
    if len(ids) == 0:
        return True
    rises = np.diff(ids, prepend=np.int32(-1)) > 0
    rises[starts_of(counts)[counts > 0]] = True
    return bool(rises.all())


def _tagged(counts: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return [N] ids with their position in the higher bits."""
    return (position_of(counts) << 24) | ids


def _has_repeat(values: NDArray[np.int64]) -> bool:
    ordered = np.sort(values)
    return bool((ordered[1:] == ordered[:-1]).any())

"""Sums, indices and checks over ragged arrays: flat values with a count per position, no Python loop over positions.

A repeated id would make a fused loss overwrite one gradient by another in silence, so both ends of the codec refuse it.
Cost: one pass over the values; where every count is equal, a reshape instead of gathers; of the check for repeated ids
one sort within each position (40 nanoseconds per position of 64 entries).

Shape letters: S positions, N values (sum of counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.payload.targets import Draws

Number = TypeVar("Number", np.int32, np.int64, np.float32, np.float64)


def uniform_count(counts: NDArray[np.int32]) -> int | None:
    """Return the count that every position shares, or None where they differ or there are no positions."""
    if len(counts) == 0:
        return None
    first = int(counts[0])
    return first if bool((counts == first).all()) else None


def starts_of(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return [S] flat index of each position's first value (where it would stand, if it has none)."""
    ends = np.cumsum(counts, dtype=np.int64)
    return ends - counts


def position_of(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return [N] the position that each value belongs to."""
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def segment_sum(values: NDArray[Number], counts: NDArray[np.int32]) -> NDArray[Number]:
    """Return [S] the sum of each position's values; 0 for a position without values."""
    count = uniform_count(counts)
    if count:
        return values.reshape(len(counts), count).sum(axis=1)
    sums: NDArray[Number] = np.zeros(len(counts), dtype=values.dtype)
    filled = counts > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts_of(counts)[filled])
    return sums


def segment_logsumexp(values: NDArray[np.float64], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return [S] log of the sum of exp of each position's values, which are descending; -inf without values."""
    result: NDArray[np.float64] = np.full(len(counts), -np.inf)
    filled = counts > 0
    if filled.any():
        top = np.zeros(len(counts))
        top[filled] = values[starts_of(counts)[filled]]
        total = segment_sum(np.exp(values - np.repeat(top, counts)), counts)
        result[filled] = top[filled] + np.log(total[filled])
    return result


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

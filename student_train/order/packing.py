"""Rows into packs: best fit over a window of open packs, in the order in which the rows come.

Each row goes into the fullest open pack that still holds it; where none does, a pack is opened, and the fullest one is
closed once `window` packs are open. A pack too full for the shortest row is closed at once. Rows are never sorted by
length, so what stands together in a pack is as random as the order of the rows.
Cost: O(log window) per row, about 1 microsecond; 4 bytes per row.

Shape letters: R rows, P packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 256
"""Open packs: enough that typical lengths fill 97 % and more, few enough that memory and look-ups do not count."""

_BLOCK = 1 << 16
_INDEX_BITS = 40


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Which rows, by position in the given order, make up which pack."""

    members: NDArray[np.int64]
    """[R] positions of rows, pack after pack, in the given order within one."""
    offsets: NDArray[np.int64]
    """[P + 1] offsets of each pack in `members`."""


def pack_rows(num_tokens: NDArray[np.integer], pack_tokens: int, window: int = WINDOW) -> Packs:
    """Pack rows of `num_tokens` [R] tokens, in this order, into packs of at most `pack_tokens` tokens.

    Raises:
        ValueError: a row is empty or longer than a pack; callers cut, drop or refuse it first.
    """
    num_rows = len(num_tokens)
    if num_rows == 0:
        return Packs(np.empty(0, np.int64), np.zeros(1, np.int64))
    shortest, longest = int(num_tokens.min()), int(num_tokens.max())
    if shortest < 1 or longest > pack_tokens:
        raise ValueError(f"rows of {shortest} to {longest} tokens do not fit packs of {pack_tokens}")
    pack_of_row = np.empty(num_rows, np.int32)
    num_packs = 0
    open_packs: list[int] = []  # tokens left << 40 | pack, ascending: the first that is large enough is the best fit
    for start in range(0, num_rows, _BLOCK):
        chosen: list[int] = []
        for length in num_tokens[start : start + _BLOCK].tolist():
            slot = bisect_left(open_packs, length << _INDEX_BITS)
            if slot < len(open_packs):
                entry = open_packs.pop(slot)
            else:
                entry = pack_tokens << _INDEX_BITS | num_packs
                num_packs += 1
                if len(open_packs) >= window:
                    del open_packs[0]
            chosen.append(entry & ((1 << _INDEX_BITS) - 1))
            entry -= length << _INDEX_BITS
            if entry >> _INDEX_BITS >= shortest:
                insort(open_packs, entry)
        pack_of_row[start : start + len(chosen)] = chosen
    members = np.argsort(pack_of_row, kind="stable")
    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of_row, minlength=num_packs), out=offsets[1:])
    return Packs(members, offsets)

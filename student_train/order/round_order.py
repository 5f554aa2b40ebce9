"""Order of training packs where the mixture changes: planned in rounds, each pure given the shares so far.

A round is a number of packs with one share of the tokens per source. Each source is an endless stream of random passes
over its rows, each row once per pass, as in `order`. A row of a source with share a, before which the round drew b
tokens of that source, is due at time (b + half of its own tokens) / a; rows are taken in the order of their times, so
that shares hold not only on average but all along. They are packed, the first packs make the round, and rows of the
others go back to the front of their streams. What a source got too little of in a round is added to what it is due in
the next.
Cost: O(rows log rows) per pass over a source; a round touches the rows that it looks at. 4 bytes per row that is drawn.

Shape letters: R rows in the caches, P packs of a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.errors import TrainingError
from student_train.order.order import EpochPlan, StageRows, Windows, shuffled, source_pass
from student_train.order.packing import pack_rows

_SPARE = 8
"""A round is packed from an eighth more tokens than it holds, so that its last packs fill as well as its first."""

_FIRST_LOOK = 256
"""Rows that a look ahead begins with; it doubles until they suffice."""

_SMALLEST = 1e-9
"""A share below it draws nothing."""


class RowStream:
    """Endless random passes over the rows of one source."""

    def __init__(
        self,
        seed: int,
        code: int,
        rows: NDArray[np.int32],
        lengths: NDArray[np.integer],
        windows: Windows | None = None,
    ) -> None:
        """Begin with the first pass over `rows`; `lengths` [R] are tokens of every row of the caches."""
        self._windows = windows
        self._seed, self._code, self._rows, self._lengths = seed, code, rows, lengths
        self._pass_tokens = int(lengths[rows].sum(dtype=np.int64))
        self._next_pass = 0
        self._waiting, self._start = np.empty(0, np.int32), 0  # rows before `_start` are drawn already
        self._held = 0
        """Tokens of the rows that wait."""

    def peek(self, num_tokens: float) -> NDArray[np.int32]:
        """Return the next rows, at least `num_tokens` tokens of them; they stay in the stream."""
        if self._held < num_tokens:
            pieces = [self._waiting[self._start :]]
            while self._held < num_tokens:
                pieces.append(source_pass(self._seed, self._code, self._next_pass, self._rows, self._windows))
                self._held += self._pass_tokens
                self._next_pass += 1
            self._waiting, self._start = np.concatenate(pieces), 0
        count = _FIRST_LOOK
        while True:
            next_rows = self._waiting[self._start : self._start + count]
            ends = np.cumsum(self._lengths[next_rows], dtype=np.int64)
            if len(next_rows) < count or ends[-1] >= num_tokens:
                return next_rows[: int(np.searchsorted(ends, num_tokens)) + 1].copy()
            count *= 2

    def remove(self, places: NDArray[np.int64]) -> None:
        """Take rows out, by their places among the next ones."""
        if len(places) == 0:
            return
        looked_at = self._waiting[self._start : self._start + int(places.max()) + 1]
        self._held -= int(self._lengths[looked_at[places]].sum(dtype=np.int64))
        left = np.delete(looked_at, places)
        looked_at[len(places) :] = left
        self._start += len(places)


class RoundPlanner:
    """Plans one round after another."""

    def __init__(self, rows: StageRows, codes: tuple[int, ...]) -> None:
        """Prepare the streams of the sources `codes`.

        Raises:
            TrainingError: a source has no row to train on, or a row is too long and must not be.
        """
        candidates, self._num_dropped = rows.usable()
        self.rows = replace(rows, eligible=None)
        """What is drawn from; which of them may be is known by now."""
        members = rows.by_source(candidates, codes)
        seed, lengths, windows = rows.seed, self.rows.lengths, rows.windows
        self._streams = {code: RowStream(seed, code, own, lengths, windows) for code, own in members.items()}
        self._credit = dict.fromkeys(members, 0.0)
        self.tokens_per_source = {code: int(lengths[own].sum(dtype=np.int64)) for code, own in members.items()}
        """Tokens of one pass over each source."""
        together = np.concatenate(list(members.values()))
        epoch = pack_rows(lengths[shuffled(seed, 0, together)], rows.pack_tokens)
        self.packs_per_epoch = len(epoch.offsets) - 1
        """Packs that hold every row of the sources once."""
        digest = xxhash.xxh3_128(f"{seed} {rows.pack_tokens} {rows.limit} {sorted(codes)}".encode())
        digest.update(together.astype("<i4").tobytes())
        digest.update(lengths[together].astype("<i4").tobytes())
        if windows is not None:
            digest.update(f" windows {windows.size}".encode() + windows.parts[together].astype("<i4").tobytes())
        self.hash = digest.hexdigest()
        """xxh3-128 of everything that the rounds depend on beside their shares, in hex."""

    def next_round(self, shares: Mapping[int, float], num_packs: int) -> EpochPlan:
        """Plan the next round of `num_packs` packs with a share per source code, scaled to sum to 1.

        Raises:
            TrainingError: every share is 0.
        """
        total = sum(shares.values())
        if total <= 0:
            raise TrainingError(
                "every share of the mixture is 0 at some step, so there is nothing to draw then; raise one of them"
            )
        wanted = {code: share / total for code, share in sorted(shares.items()) if share > _SMALLEST * total}
        lengths, pack_tokens = self.rows.lengths, self.rows.pack_tokens
        budget = (num_packs + max(1, num_packs // _SPARE)) * pack_tokens
        drawn, codes, places = self._in_time_order(wanted, budget)
        packs = pack_rows(lengths[drawn], pack_tokens)
        offsets = packs.offsets[: num_packs + 1]
        used = packs.members[: offsets[-1]]
        kept = lengths[drawn[used]]
        kept_tokens = int(kept.sum(dtype=np.int64))
        for code in wanted:
            mine = codes[used] == code
            self._streams[code].remove(places[used[mine]])
            self._credit[code] += wanted[code] * kept_tokens - int(kept[mine].sum(dtype=np.int64))
        num_dropped, self._num_dropped = self._num_dropped, 0  # said once
        return EpochPlan.of(drawn[used], offsets, self.rows, num_dropped)

    def _in_time_order(
        self, wanted: Mapping[int, float], budget: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Return at least `budget` tokens of rows in the order in which they are due, each one's source, and its place
        there.
        """
        rows, times, codes, places = [], [], [], []
        for code, share in wanted.items():
            own = self._streams[code].peek(max(share * budget + self._credit[code], 0.0) + 2 * self.rows.limit)
            lengths = self.rows.lengths[own].astype(np.int64)
            due = (np.cumsum(lengths) - 0.5 * lengths - self._credit[code]) / share
            rows.append(own)
            times.append(due)
            codes.append(np.full(len(own), code, np.int64))
            places.append(np.arange(len(own), dtype=np.int64))
        order = np.argsort(np.concatenate(times), kind="stable")
        drawn = np.concatenate(rows)[order]
        ends = np.cumsum(self.rows.lengths[drawn], dtype=np.int64)
        order = order[: int(np.searchsorted(ends, budget)) + 1]
        return np.concatenate(rows)[order], np.concatenate(codes)[order], np.concatenate(places)[order]

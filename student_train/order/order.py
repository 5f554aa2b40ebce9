"""Order of training packs: a pure function of seed, epoch, mixture and row lengths.

Every rank and every resumed run computes the same list, so the only state to save is a position in it. Rows are sorted
by random keys from a counter-based generator (Philox, whose raw stream numpy guarantees), packed, and the packs sorted
by keys again.

A mixture gives each source a share of the *tokens drawn*. An epoch then draws as many tokens as the named sources have
together. A source's draws run through one random pass over its rows after another, each row once per pass; they form
one endless stream of tokens, and epoch e takes the rows that begin in the e-th slice of it. So a source below its share
repeats rows evenly, one above it is sub-sampled without neglecting any row, and shares are exact to one row. A source
that the mixture does not name is not drawn.

Windows, where asked for: the caches' parts are drawn at random into windows of so many, the rows are taken window
after window, and rows and packs are shuffled within one. So training reads a few parts at a time and each once per
epoch, which lets it stream; what is lost is that rows of two windows never meet in a pack.
Cost: O(rows log rows) once per epoch, 12 bytes per row at its peak and 4 afterwards; no sequence is read.

Shape letters: R rows in the caches, D rows drawn in the epoch, P packs in the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.errors import TrainingError
from student_train.order.packing import Packs, pack_rows

_ROWS, _PACKS, _PARTS, _FIRST_SOURCE = 0, 1, 2, 16


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """The packs of one epoch in training order."""

    rows: NDArray[np.int32]
    """[D] row indices, pack after pack."""
    offsets: NDArray[np.int64]
    """[P + 1] offsets of each pack in `rows`."""
    num_tokens: int
    """Tokens in all packs, after cutting."""
    fill: float
    """Share of the packs' room that holds tokens, 0 to 1."""
    num_cut: int
    """Rows drawn that lose their end because they are longer than a pack or `max_length`."""
    num_dropped: int
    """Rows left out because they are too long."""
    hash: str
    """xxh3-128 of rows and offsets, in hex."""

    @classmethod
    def of(cls, drawn: NDArray[np.int32], offsets: NDArray[np.int64], rows: StageRows, num_dropped: int) -> EpochPlan:
        """Count what packs of drawn rows hold."""
        total = int(rows.lengths[drawn].sum(dtype=np.int64))
        fill = total / ((len(offsets) - 1) * rows.pack_tokens)
        num_cut = int(np.count_nonzero(rows.num_tokens[drawn] > rows.limit))
        digest = xxhash.xxh3_128(drawn.astype("<i4").tobytes())
        digest.update(offsets.astype("<i8").tobytes())
        return cls(drawn, offsets, total, fill, num_cut, num_dropped, digest.hexdigest())

    @property
    def num_packs(self) -> int:
        """P, the number of packs."""
        return len(self.offsets) - 1

    def pack(self, index: int) -> NDArray[np.int32]:
        """Return the row indices of one pack."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def random_keys(seed: int, purpose: int, round_: int, count: int) -> NDArray[np.uint64]:
    """Return `count` random 64-bit keys that depend on the three numbers alone."""
    generator = np.random.Philox(key=np.array([seed % 2**64, (purpose << 40) + round_], dtype=np.uint64))
    return generator.random_raw(count)


def length_limit(pack_tokens: int, max_length: int | None) -> int:
    """Return the longest row, in tokens, that is trained on whole."""
    return pack_tokens if max_length is None else min(pack_tokens, max_length)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of parts within which rows are shuffled."""

    parts: NDArray[np.int32]
    """[R] number of the part that each row lies in."""
    size: int
    """Parts of a window."""

    def of_rows(self, seed: int, epoch: int, rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the window of each row in an epoch, from 0: with parts [0, 0, 1, 2] and windows of 2, [0, 0, 1, 0],
        say.
        """
        order = np.argsort(random_keys(seed, _PARTS, epoch, int(self.parts.max()) + 1), kind="stable")
        window_of_part = np.empty(len(order), np.int64)
        window_of_part[order] = np.arange(len(order)) // self.size
        return window_of_part[self.parts[rows]]


@dataclass(frozen=True, eq=False)
class StageRows:
    """The rows that a stage draws from, and all that their order depends on beside the mixture."""

    seed: int
    num_tokens: NDArray[np.integer]
    """[R] tokens per row."""
    sources: NDArray[np.integer] | None
    """[R] source code per row; needed with a mixture only."""
    pack_tokens: int
    """Room of a pack."""
    max_length: int | None = None
    """Longest row in tokens, if shorter than a pack."""
    too_long: str = "cut"
    """`cut` keeps a longer row's beginning, `drop` leaves it out, `refuse` raises."""
    eligible: NDArray[np.integer] | None = None
    """Indices of the rows that may be drawn, ascending; None for all."""
    windows: Windows | None = None
    """Windows of parts that the rows are taken from one after another; None shuffles all rows together."""
    source_names: Sequence[str] = ()
    """What messages call each source code; its number where there are none."""

    @property
    def limit(self) -> int:
        """Longest row, in tokens, that is trained on whole."""
        return length_limit(self.pack_tokens, self.max_length)

    @cached_property
    def lengths(self) -> NDArray[np.integer]:
        """[R] tokens per row that are trained on."""
        lengths: NDArray[np.integer] = np.minimum(self.num_tokens, self.limit)
        return lengths

    def usable(self) -> tuple[NDArray[np.int32], int]:
        """Return the rows that may be drawn, ascending, and how many are left out because they are too long.

        Raises:
            TrainingError: a row is too long and `too_long` is `refuse`.
        """
        everything = np.arange(len(self.num_tokens), dtype=np.int32)
        candidates = everything if self.eligible is None else self.eligible.astype(np.int32)
        too_many = self.num_tokens[candidates] > self.limit
        if self.too_long == "refuse" and too_many.any():
            row = int(candidates[np.argmax(too_many)])
            raise TrainingError(
                f"row {row} has {int(self.num_tokens[row])} tokens where max_length and pack_tokens allow {self.limit} "
                f"({int(too_many.sum())} such rows); raise them, or set too_long to cut or drop"
            )
        if self.too_long == "drop":
            return candidates[~too_many], int(too_many.sum())
        return candidates, 0

    def by_source(self, candidates: NDArray[np.int32], codes: Iterable[int]) -> dict[int, NDArray[np.int32]]:
        """Return those of the candidates that are of each source, by code, ascending.

        Raises:
            TrainingError: a source has none.
        """
        assert self.sources is not None
        of_rows = self.sources[candidates]
        found = {code: candidates[of_rows == code] for code in sorted(codes)}
        empty = [
            f"'{self.source_names[code]}'" if self.source_names else code for code in found if not len(found[code])
        ]
        if empty:
            raise TrainingError(
                f"the mixture asks for source {empty[0]}, which has no row to train on; leave it out of the mixture or "
                "add rows"
            )
        return found


def plan_epoch(rows: StageRows, epoch: int, mixture: Mapping[int, float] | None) -> EpochPlan:
    """Plan the packs of one epoch.

    Args:
        rows: what is drawn from.
        epoch: from 0.
        mixture: share per source code, scaled to sum to 1; None draws every row once.

    Raises:
        TrainingError: nothing is left to train on, or a row is too long and must not be.
    """
    candidates, num_dropped = rows.usable()
    drawn = shuffled(rows.seed, epoch, candidates) if mixture is None else _mixed(rows, candidates, epoch, mixture)
    if len(drawn) == 0:
        raise TrainingError(
            f"no row is left to train on: {num_dropped} are longer than {rows.limit} tokens, and the rest are held out "
            "or not in the mixture; raise max_length, lower heldout.fraction or name another source"
        )
    windows = rows.windows
    of_rows = np.zeros(len(drawn), np.int64) if windows is None else windows.of_rows(rows.seed, epoch, drawn)
    drawn = drawn[np.argsort(of_rows, kind="stable")]
    packs, of_packs = _packed(rows.lengths[drawn], np.bincount(of_rows), rows.pack_tokens)
    num_packs = len(packs.offsets) - 1
    order = np.lexsort((random_keys(rows.seed, _PACKS, epoch, num_packs), of_packs))
    sizes = np.diff(packs.offsets)[order]
    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    within = np.arange(len(drawn), dtype=np.int64) - np.repeat(offsets[:-1], sizes)
    drawn = drawn[packs.members[np.repeat(packs.offsets[:-1][order], sizes) + within]]
    return EpochPlan.of(drawn, offsets, rows, num_dropped)


def _packed(
    lengths: NDArray[np.integer], rows_of_windows: NDArray[np.int64], pack_tokens: int
) -> tuple[Packs, NDArray[np.int64]]:
    """Pack rows, window after window, and return also the window of each pack."""
    starts = np.cumsum(rows_of_windows) - rows_of_windows
    each = [pack_rows(lengths[a : a + n], pack_tokens) for a, n in zip(starts, rows_of_windows, strict=True)]
    members = np.concatenate([packs.members + start for packs, start in zip(each, starts, strict=True)])
    ends = np.concatenate([packs.offsets[1:] + start for packs, start in zip(each, starts, strict=True)])
    counts = [len(packs.offsets) - 1 for packs in each]
    return Packs(members, np.concatenate([[0], ends])), np.repeat(np.arange(len(each)), counts)


def source_pass(
    seed: int, code: int, pass_index: int, rows: NDArray[np.int32], windows: Windows | None = None
) -> NDArray[np.int32]:
    """Return the rows of source `code` in the order of one random pass over them, window after window where asked."""
    keys = random_keys(seed, _FIRST_SOURCE + code, pass_index, len(rows))
    within = np.zeros(len(rows), np.int64) if windows is None else windows.of_rows(seed, pass_index, rows)
    order: NDArray[np.int64] = np.lexsort((keys, within))
    return rows[order]


def shuffled(seed: int, epoch: int, candidates: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return every candidate once, in the random order of an epoch."""
    return candidates[np.argsort(random_keys(seed, _ROWS, epoch, len(candidates)), kind="stable")]


def _mixed(
    rows: StageRows, candidates: NDArray[np.int32], epoch: int, mixture: Mapping[int, float]
) -> NDArray[np.int32]:
    """Return the epoch's draws of all sources in the mixture, in random order."""
    members = rows.by_source(candidates, [code for code, share in mixture.items() if share > 0])
    total = sum(int(rows.lengths[own].sum(dtype=np.int64)) for own in members.values())
    scale = total / sum(mixture[code] for code in members)
    streams = [
        _slice_of_source(rows.seed, epoch, code, own, rows.lengths, round(mixture[code] * scale))
        for code, own in members.items()
    ]
    return shuffled(rows.seed, epoch, np.concatenate([np.empty(0, np.int32), *streams]))


def _slice_of_source(
    seed: int, epoch: int, code: int, rows: NDArray[np.int32], lengths: NDArray[np.integer], budget: int
) -> NDArray[np.int32]:
    """Return the rows that begin within tokens `epoch * budget` to `(epoch + 1) * budget` of endless random passes over
    `rows`.
    """
    pass_tokens = int(lengths[rows].sum(dtype=np.int64))
    first, end = epoch * budget, (epoch + 1) * budget
    pieces = [np.empty(0, np.int32)]
    for pass_index in range(first // pass_tokens, (end - 1) // pass_tokens + 1 if budget else 0):
        order = source_pass(seed, code, pass_index, rows)
        ends = np.cumsum(lengths[order], dtype=np.int64)
        begins = ends - lengths[order] + pass_index * pass_tokens
        pieces.append(order[np.searchsorted(begins, first) : np.searchsorted(begins, end)])
    return np.concatenate(pieces)

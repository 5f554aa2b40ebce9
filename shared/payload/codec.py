"""A row's sparse targets as bytes and back: quantised, split into byte planes, one zstandard frame.

Algorithm: head log-probabilities become integer codes, code_j = round((lp_0 - lp_j) / gap_step) below the position's
first entry, and what is stored are the differences of successive codes. Rounding the distance to the *first* entry is
closed-loop: every decoded distance is within gap_step / 2 of the true one, however many entries precede it. The head's
level is not stored; it follows from the tail's mass at temperature 1, so that every decoded position sums to 1. Labels
and tails: shared/payload/quantise.py. Layout byte by byte: docs/format.md.

Error bounds: distance to the first entry gap_step / 2 (codes are capped at 65535: 4096 nats at 1/16); level: what a
distance error and a tail error of 1/2048 log-odds make of it; label 1/1024 nat; ids, counts and draws exact. Cost: no
Python loop over positions; about 1 microsecond per position of 64 entries either way, and 50 per row (rows are
quantised in batches).

Shape letters: S positions, N head entries (sum of counts), J temperatures, D draws of one temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.payload.frame import PlaneReader, compress_planes, decompress_frame, split_planes
from shared.payload.quantise import TAIL_ALL, label_codes, label_table, tail_codes, tail_tables
from shared.payload.ragged import has_repeated_id, is_ascending, segment_sum, starts_of, uniform_count
from shared.payload.row_batches import join_rows, row_batches
from shared.payload.targets import Draws, SparseTargets
from shared.schema import (
    MAX_DRAWS,
    MAX_ENTRIES_PER_ROW,
    MAX_GAP_STEP,
    MAX_K,
    MAX_TEMPERATURES,
    MAX_TOKENS_PER_ROW,
    MAX_VOCAB_SIZE,
    MIN_GAP_STEP,
)

CODEC_NAME = "planes-1"
"""Name of this codec in a layer's identity; another layout or quantiser gets another name."""

_MAX_CODE = 65_535
_SAFE_SUMMANDS = 2**15
"""So many gaps of 16 bits add up within 31 bits."""
_MOST_MASS_ERROR = 0.01


class Codec:
    """Encoder and decoder for one capture setting; safe to share between threads, cheap to pickle."""

    def __init__(
        self,
        gap_step: float,
        temperatures: tuple[float, ...] = (1.0,),
        draws: int = 0,
        vocab_size: int = MAX_VOCAB_SIZE,
        max_k: int = MAX_K,
    ) -> None:
        """Fix what is not stored in each row.

        Args:
            gap_step: quantisation step of head log-probabilities in nats.
            temperatures: captured temperatures, ascending, 1.0 among them.
            draws: m, tokens drawn per position and temperature; 0 for none.
            vocab_size: ids lie below it.
            max_k: no position has more head entries.

        Raises:
            ValueError: a setting out of its range.
        """
        if not MIN_GAP_STEP <= gap_step <= MAX_GAP_STEP:
            raise ValueError(f"gap_step must be within [{MIN_GAP_STEP}, {MAX_GAP_STEP}] nats, got {gap_step}")
        ascending = all(a < b for a, b in pairwise(temperatures))
        if (
            not ascending
            or 1.0 not in temperatures
            or not 0 < len(temperatures) <= MAX_TEMPERATURES
            or temperatures[0] <= 0
        ):
            raise ValueError(f"temperatures must ascend, be positive and hold 1.0, got {temperatures}")
        if not 0 <= draws <= MAX_DRAWS or not 0 < vocab_size <= MAX_VOCAB_SIZE or not 0 <= max_k <= MAX_K:
            raise ValueError(f"out of range: draws {draws}, vocab_size {vocab_size} or max_k {max_k}")
        self.gap_step = float(gap_step)
        self.temperatures = tuple(float(t) for t in temperatures)
        self.draws = draws
        self.vocab_size = vocab_size
        self.max_k = max_k
        self._unit = self.temperatures.index(1.0)
        self._mass_below_first = np.exp(-np.arange(_MAX_CODE + 1) * self.gap_step)

    def __reduce__(self) -> tuple[type[Codec], tuple[float, tuple[float, ...], int, int, int]]:
        """Pickle the settings alone."""
        return Codec, (self.gap_step, self.temperatures, self.draws, self.vocab_size, self.max_k)

    def encode(self, targets: SparseTargets) -> bytes:
        """Return the blob of one row's targets; errors as for `encode_rows`."""
        return self.encode_rows([targets])[0]

    def encode_rows(self, rows: Sequence[SparseTargets]) -> list[bytes]:
        """Return the blob of each row's targets.

        Raises:
            ValueError: the arrays contradict each other or the codec's settings: a programming error of the caller.
        """
        for row in rows:
            self._check_shapes(row)
        return [blob for batch in row_batches(rows) for blob in self._encode_batch(batch)]

    def _encode_batch(self, rows: Sequence[SparseTargets]) -> Iterator[bytes]:
        """Quantise and check rows together, then compress the planes of each."""
        columns = self._columns(join_rows(rows))
        planes = [(plane, kind) for values, num_bytes, kind in columns for plane in split_planes(values, num_bytes)]
        sizes = {"position": [row.num_positions for row in rows], "entry": [len(row.ids) for row in rows]}
        sizes["gap"] = [len(row.ids) - int(np.count_nonzero(row.counts)) for row in rows]
        sizes |= {f"draw {j}": [len(row.draws[j].ids) for row in rows] for j in range(len(rows[0].draws))}
        ends = {kind: [0, *accumulate(each)] for kind, each in sizes.items()}
        for i in range(len(rows)):
            yield compress_planes([plane[ends[kind][i] : ends[kind][i + 1]] for plane, kind in planes])

    def _columns(self, targets: SparseTargets) -> list[tuple[NDArray[Any], int, str]]:
        """Return the integers to store, in order, with bytes per integer and what there is one of: position, entry, gap
        or draw.
        """
        counts, ids = targets.counts, targets.ids
        self._check_ids(ids, "head")
        tails = tail_codes(targets.tail_logmass, counts > 0)
        self._check_masses(targets)
        columns: list[tuple[NDArray[Any], int, str]] = [
            (counts, 2, "position"),
            (ids, 3, "entry"),
            (self._gaps(targets.logprobs, counts), 2, "gap"),
            (label_codes(targets.label_logprobs), 2, "position"),
        ]
        columns += [(tails[:, j], 2, "position") for j in range(len(self.temperatures))]
        for j, drawn in enumerate(targets.draws):
            self._check_ids(drawn.ids, "drawn")
            problem = self._draws_problem(drawn, counts)
            if problem:
                raise ValueError(problem)
            columns += [
                (drawn.counts, 2, "position"),
                (drawn.ids, 3, f"draw {j}"),
                (drawn.multiplicities, 2, f"draw {j}"),
            ]
        if has_repeated_id(counts, ids, targets.draws):
            raise ValueError("a position names a token id twice")
        return columns

    def decode(self, blob: bytes | memoryview, num_positions: int) -> SparseTargets:
        """Return one row's targets.

        Raises:
            DamagedError: the blob is not a frame of this codec with `num_positions` positions.
        """
        reader = PlaneReader(decompress_frame(blob, self.max_content_bytes(num_positions)))
        counts = reader.take(num_positions, 2)
        num_entries = int(counts.sum(dtype=np.int64))
        if num_entries > MAX_ENTRIES_PER_ROW or (num_positions and int(counts.max()) > self.max_k):
            raise DamagedError(
                f"a position claims {int(counts.max())} head entries where at most {self.max_k} are possible"
            )
        ids = reader.take(num_entries, 3)
        gaps = reader.take(num_entries - int(np.count_nonzero(counts)), 2)
        label_logprobs = label_table()[reader.take(num_positions, 2)]
        tails = np.stack([reader.take(num_positions, 2) for _ in self.temperatures], axis=1)
        draws = tuple(self._take_draws(reader, num_positions, counts) for _ in self.temperatures) if self.draws else ()
        reader.finish()
        if num_entries and int(ids.max()) >= self.vocab_size:
            raise DamagedError(f"token id {int(ids.max())} lies outside the vocabulary of {self.vocab_size}")
        if has_repeated_id(counts, ids, draws):
            raise DamagedError("a position names a token id twice")
        if bool(((tails == TAIL_ALL) != (counts == 0)[:, None]).any()):
            raise DamagedError("a position has a tail of 1 beside a head, or neither")
        log_tail, log_head = tail_tables()
        logprobs = self._logprobs(gaps, counts, log_head[tails[:, self._unit]])
        tail_logmass = log_tail[tails].astype(np.float32)
        return SparseTargets(counts, ids, logprobs, label_logprobs, tail_logmass, self.temperatures, draws)

    def max_content_bytes(self, num_positions: int) -> int:
        """Return the most bytes that a row's planes can take before compression."""
        if not 0 <= num_positions <= MAX_TOKENS_PER_ROW:
            raise DamagedError(
                f"a row claims {num_positions} positions where at most {MAX_TOKENS_PER_ROW} are possible"
            )
        entries = min(num_positions * self.max_k, MAX_ENTRIES_PER_ROW)
        drawn = min(num_positions * self.draws, MAX_ENTRIES_PER_ROW)
        per_temperature = 2 * num_positions + ((2 * num_positions + 5 * drawn) if self.draws else 0)
        return 4 * num_positions + 5 * entries + len(self.temperatures) * per_temperature

    def _gaps(self, logprobs: NDArray[np.float32], counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return [N - positions with a head] differences of successive codes; a head's first code is always 0."""
        count = uniform_count(counts)
        scale = np.float32(1.0 / self.gap_step)
        if count:
            grid = logprobs.reshape(len(counts), count)
            sorted_down = bool((grid[:, 1:] <= grid[:, :-1]).all())
            codes = np.minimum(np.rint((grid[:, :1] - grid) * scale), _MAX_CODE).astype(np.int32)
            gaps = np.diff(codes, axis=1).ravel()
        else:
            later = _not_first(counts)
            sorted_down = bool((np.diff(logprobs, prepend=np.float32(0))[later] <= 0).all())
            first = np.repeat(logprobs[~later], counts[counts > 0])
            codes = np.minimum(np.rint((first - logprobs) * scale), _MAX_CODE).astype(np.int32)
            gaps = np.diff(codes, prepend=np.int32(0))[later]
        if not sorted_down:
            raise ValueError("a head is not sorted by descending log-probability")
        return gaps

    def _logprobs(
        self, gaps: NDArray[np.int32], counts: NDArray[np.int32], log_head: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Return [N] log-probabilities of heads whose masses are exp(`log_head`) [S]."""
        count = uniform_count(counts)
        filled = counts > 0
        if count:
            codes = np.zeros((len(counts), count), np.int64 if count > _SAFE_SUMMANDS else np.int32)
            np.cumsum(gaps.reshape(len(counts), count - 1), axis=1, out=codes[:, 1:])
        else:
            later = _not_first(counts)
            running = np.zeros(len(later), np.int64)
            running[later] = gaps
            np.cumsum(running, out=running)
            codes = running - np.repeat(running[~later], counts[filled])
        if codes.size and int(codes.max()) > _MAX_CODE:
            raise DamagedError(f"a head's log-probability lies {int(codes.max())} steps below its first entry")
        mass_over_first = segment_sum(self._mass_below_first[codes].ravel(), counts)
        level = (log_head[filled] - np.log(mass_over_first[filled])).astype(np.float32)
        drop = codes.astype(np.float32) * np.float32(self.gap_step)
        if count:
            return (level[:, None] - drop).ravel()
        return np.repeat(level, counts[filled]) - drop

    def _take_draws(self, reader: PlaneReader, num_positions: int, head_counts: NDArray[np.int32]) -> Draws:
        """Read and check the draws of one temperature."""
        counts = reader.take(num_positions, 2)
        num_draws = int(counts.sum(dtype=np.int64))
        if num_positions and int(counts.max()) > self.draws:
            raise DamagedError(f"a position claims {int(counts.max())} drawn tokens where {self.draws} were drawn")
        drawn = Draws(counts, reader.take(num_draws, 3), reader.take(num_draws, 2))
        if num_draws and int(drawn.ids.max()) >= self.vocab_size:
            raise DamagedError(f"token id {int(drawn.ids.max())} lies outside the vocabulary of {self.vocab_size}")
        problem = self._draws_problem(drawn, head_counts)
        if problem:
            raise DamagedError(problem)
        return drawn

    def _draws_problem(self, drawn: Draws, head_counts: NDArray[np.int32]) -> str | None:
        if not is_ascending(drawn.counts, drawn.ids):
            return "drawn token ids do not ascend within a position"
        totals = segment_sum(drawn.multiplicities, drawn.counts)
        if not bool(((totals == self.draws) | ((totals == 0) & (head_counts > 0))).all()):
            return f"the draws of a position do not add up to {self.draws}"
        if len(drawn.multiplicities) and int(drawn.multiplicities.min()) < 1:
            return "a drawn token has a multiplicity below 1"
        return None

    def _check_shapes(self, targets: SparseTargets) -> None:
        """Refuse a row whose arrays do not fit each other or this codec."""
        num_positions = targets.num_positions
        if num_positions > MAX_TOKENS_PER_ROW:
            raise ValueError(f"a row has at most {MAX_TOKENS_PER_ROW} positions, got {num_positions}")
        if targets.temperatures != self.temperatures:
            raise ValueError(f"targets were captured at {targets.temperatures}, the codec holds {self.temperatures}")
        if targets.label_logprobs.shape != (num_positions,):
            raise ValueError(f"label_logprobs must be [{num_positions}], got {targets.label_logprobs.shape}")
        if targets.tail_logmass.shape != (num_positions, len(self.temperatures)):
            raise ValueError(
                f"tail_logmass must be [{num_positions}, {len(self.temperatures)}], got {targets.tail_logmass.shape}"
            )
        if targets.logprobs.shape != targets.ids.shape or targets.ids.ndim != 1:
            raise ValueError(
                f"ids {targets.ids.shape} and logprobs {targets.logprobs.shape} must be flat and equally long"
            )
        _check_counts(targets.counts, self.max_k, len(targets.ids))
        if len(targets.draws) != (len(self.temperatures) if self.draws else 0):
            raise ValueError(
                f"draws of {len(targets.draws)} temperatures do not fit {self.draws} draws at {self.temperatures}"
            )
        for drawn in targets.draws:
            if drawn.counts.shape != (num_positions,) or drawn.ids.shape != drawn.multiplicities.shape:
                raise ValueError("the arrays of draws do not fit each other")
            _check_counts(drawn.counts, self.draws, len(drawn.ids))

    def _check_masses(self, targets: SparseTargets) -> None:
        """Refuse positions that do not sum to 1 at temperature 1, within what 16-bit engines are off."""
        if not bool(np.isfinite(targets.logprobs).all()):
            raise ValueError("a head's log-probability is not finite; entries of probability 0 belong to no head")
        head_mass = segment_sum(np.exp(targets.logprobs), targets.counts)
        total = head_mass + np.exp(targets.tail_logmass[:, self._unit])
        if not bool((np.abs(total - 1.0) < _MOST_MASS_ERROR).all()):
            worst = float(total[np.argmax(np.abs(total - 1.0))])
            raise ValueError(f"head and tail of a position must sum to 1 at temperature 1, got {worst:.4f}")

    def _check_ids(self, ids: NDArray[np.int32], kind: str) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"a {kind} id lies outside [0, {self.vocab_size})")


def _not_first(counts: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return [N] whether an entry has one before it in its position."""
    later = np.ones(int(counts.sum(dtype=np.int64)), dtype=np.bool_)
    later[starts_of(counts)[counts > 0]] = False
    return later


def _check_counts(counts: NDArray[np.int32], most: int, total: int) -> None:
    """Refuse counts that are negative, too large or do not add up."""
    if int(counts.sum(dtype=np.int64)) != total or total > MAX_ENTRIES_PER_ROW:
        raise ValueError(
            f"counts add up to {int(counts.sum(dtype=np.int64))} for {total} entries (most: {MAX_ENTRIES_PER_ROW})"
        )
    if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= most:
        raise ValueError(f"counts must lie in [0, {most}], got [{int(counts.min())}, {int(counts.max())}]")

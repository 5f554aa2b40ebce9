"""A pack's sparse teacher distributions as tensors, and their members at one temperature, chunk by chunk.

A *member* is a token whose teacher mass is known by itself: an entry of the head, or a drawn token, which stands for
`tail mass x multiplicity / draws`. What no member holds is the *bucket*: all other tokens together. Where a position
has draws they carry the tail's mass and its bucket is empty; otherwise the bucket carries it. A padded slot points at
column V, one beyond the vocabulary, which the operator keeps as a dump: it reads as -inf, and what is written there is
never used. At T != 1 the head's ratios are those of logprobs / T and its mass is what the captured tail at T leaves:
exact. Cost: linear in the entries; where every position has as many entries as the next, views instead of gathers.

Shape letters: S positions, N head entries, D drawn tokens of one temperature, J captured temperatures, C positions of a
chunk, K members of the chunk's longest position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import TrainingError, UsageError
from shared.payload.targets import SparseTargets
from shared.payload.targets_at import temperature_index


def pack_targets(rows: Sequence[SparseTargets]) -> dict[str, np.ndarray]:
    """Concatenate rows' targets into the arrays of one pack, ready to become tensors.

    Returns `support_counts` int32 [S], `support_ids` int64 [N], `support_logprobs` f32 [N], `label_logprobs` f32 [S],
    `row_begins` bool [S], `tail_logmass` f32 [S, J], `temperatures` f64 [J]; where draws were made also `draw_counts`
    int32 [J, S], `draw_ids` int64 and `draw_multiplicities` int32, both flat by temperature, then position.

    Raises:
        TrainingError: the rows were captured at different temperatures, or only some with draws.
    """
    if not rows:
        raise ValueError("a pack holds at least one row")
    temperatures = rows[0].temperatures
    for row in rows:
        if row.temperatures != temperatures or len(row.draws) != len(rows[0].draws):
            raise TrainingError(
                f"one pack mixes targets captured at temperatures {list(temperatures)} with {len(rows[0].draws)} sets "
                f"of draws and at {list(row.temperatures)} with {len(row.draws)}; train on caches whose targets were "
                "captured alike"
            )
    arrays: dict[str, np.ndarray] = {
        "support_counts": np.concatenate([row.counts for row in rows]).astype(np.int32, copy=False),
        "support_ids": np.concatenate([row.ids for row in rows]).astype(np.int64),
        "support_logprobs": np.concatenate([row.logprobs for row in rows]).astype(np.float32, copy=False),
        "label_logprobs": np.concatenate([row.label_logprobs for row in rows]).astype(np.float32, copy=False),
        "row_begins": np.concatenate([np.arange(row.num_positions) == 0 for row in rows]),
        "tail_logmass": np.concatenate([row.tail_logmass for row in rows]).astype(np.float32, copy=False),
        "temperatures": np.asarray(temperatures, dtype=np.float64),
    }
    if rows[0].draws:
        by_temperature = range(len(temperatures))
        arrays["draw_counts"] = np.stack(
            [np.concatenate([row.draws[j].counts for row in rows]) for j in by_temperature]
        ).astype(np.int32)
        arrays["draw_ids"] = np.concatenate([row.draws[j].ids for j in by_temperature for row in rows]).astype(np.int64)
        arrays["draw_multiplicities"] = np.concatenate(
            [row.draws[j].multiplicities for j in by_temperature for row in rows]
        ).astype(np.int32)
    return arrays


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """The teacher's masses at C positions and one temperature."""

    ids: Tensor
    """[C, K] int64 token ids; V in padded slots."""
    log_p: Tensor
    """[C, K + 1] natural logs of the members' masses and, last, the bucket's; -inf in padded slots and empty buckets.
    """
    num_head: int
    """How many of the K are slots of the head; drawn tokens follow."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ragged:
    """Token ids with one number each, flat, a count per position. `counts_host` stays on the CPU: shapes are decided
    there.
    """

    counts: Tensor
    counts_host: Tensor
    starts: Tensor
    ids: Tensor
    numbers: Tensor

    @staticmethod
    def of(counts: Tensor, ids: Tensor, numbers: Tensor) -> _Ragged:
        """Split flat ids and numbers by counts [S], which are read back to the host."""
        counts_host = counts.to("cpu", torch.int64)
        if int(counts_host.sum()) != len(ids) or len(ids) != len(numbers):
            raise ValueError(
                f"{int(counts_host.sum())} entries counted, {len(ids)} ids and {len(numbers)} numbers given"
            )
        starts_host = counts_host.cumsum(0) - counts_host
        return _Ragged(
            counts_host.to(ids.device), counts_host, starts_host.to(ids.device), ids.to(torch.int64), numbers
        )

    def to(self, device: torch.device | str) -> _Ragged:
        """Return the same on a device, but for what stays on the host."""
        moved = [tensor.to(device, non_blocking=True) for tensor in (self.counts, self.starts, self.ids, self.numbers)]
        return _Ragged(moved[0], self.counts_host, *moved[1:])

    def padded(self, where: slice, pad_id: int, pad_number: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return [C, K] ids and numbers of the positions `where`, padded to the longest of them."""
        counts_host = self.counts_host[where]
        shortest, longest = int(counts_host.min()), int(counts_host.max())
        if shortest == longest:
            first = int(self.counts_host[: where.start].sum())
            flat = slice(first, first + longest * len(counts_host))
            shape = (len(counts_host), longest)
            return self.ids[flat].view(shape), self.numbers[flat].view(shape).to(dtype)
        slot = torch.arange(longest, device=self.ids.device)
        outside = slot >= self.counts[where, None]
        entry = (self.starts[where, None] + slot).masked_fill_(outside, 0)
        ids = self.ids[entry].masked_fill_(outside, pad_id)
        return ids, self.numbers[entry].to(dtype).masked_fill_(outside, pad_number)


def targets_in(batch: Mapping[str, Any]) -> TargetBatch | dict[str, TargetBatch] | None:
    """Return a batch's targets: one teacher's, several teachers' by their keys, or None where it has labels alone."""
    prefixes = teacher_prefixes(batch)
    if prefixes == [""]:
        return TargetBatch.from_batch(batch)
    return {prefix[:-1]: TargetBatch.from_batch(_below(batch, prefix)) for prefix in prefixes} or None


def teacher_prefixes(names: Iterable[str]) -> list[str]:
    """Return what the names of each teacher's arrays begin with: [""] of one teacher, ["code/", "math/"] of several."""
    last = "support_counts"  # every teacher has it
    return sorted({name.removesuffix(last) for name in names if name.endswith(last)})


def _below(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True, eq=False)
class TargetBatch:
    """Sparse teacher distributions of S supervised positions."""

    head: _Ragged
    """Head entries with their log-probabilities at T = 1."""
    tail_logmass: Tensor
    """[S, J] log of the mass outside the head."""
    temperatures: tuple[float, ...]
    """J captured temperatures."""
    draws: tuple[_Ragged, ...]
    """Drawn tokens with their multiplicities per temperature, or empty."""
    max_token_id: int
    """Largest token id of any member, -1 without members."""
    positions: Tensor | None = None
    """[S] int64 ascending: which of the batch's positions these are; None: they are all of them."""
    positions_host: Tensor | None = None
    """The same on the CPU, where it is decided which of them a chunk holds."""
    label_logprobs: Tensor | None = None
    """[S] of the tokens of the text."""
    row_begins: Tensor | None = None
    """[S] bool: the first position of its row; None: they are one row's."""
    tail_is_known: bool = True
    """Whether the mass outside the head is; in the arrays, NaN stands for a mass that is not."""

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> TargetBatch:
        """Take the tensors that `pack_targets` named out of a batch, and `positions` where they are of some positions.
        Reads counts and positions back to the host, once.
        """
        head = _Ragged.of(batch["support_counts"], batch["support_ids"], batch["support_logprobs"])
        temperatures = tuple(float(t) for t in batch["temperatures"].tolist())
        draws: list[_Ragged] = []
        if "draw_counts" in batch:
            counts, first = batch["draw_counts"].to("cpu", torch.int64), 0
            for j in range(len(temperatures)):
                flat = slice(first, first + int(counts[j].sum()))
                draws.append(_Ragged.of(counts[j], batch["draw_ids"][flat], batch["draw_multiplicities"][flat]))
                first = flat.stop
        every_id = [ragged.ids.max() for ragged in (head, *draws) if len(ragged.ids)]
        max_token_id = max(int(largest) for largest in every_id) if every_id else -1
        positions = batch.get("positions")
        return cls(
            head,
            batch["tail_logmass"],
            temperatures,
            tuple(draws),
            max_token_id,
            positions=positions,
            positions_host=None if positions is None else positions.to("cpu", torch.int64),
            label_logprobs=batch.get("label_logprobs"),
            row_begins=batch.get("row_begins"),
            tail_is_known=not bool(batch["tail_logmass"].isnan().any()),
        )

    @classmethod
    def from_rows(cls, rows: Sequence[SparseTargets]) -> TargetBatch:
        """Build the batch of one pack of rows on the CPU."""
        return cls.from_batch({name: torch.from_numpy(array) for name, array in pack_targets(rows).items()})

    @property
    def num_positions(self) -> int:
        """S, the number of supervised positions."""
        return len(self.tail_logmass)

    def to(self, device: torch.device | str) -> TargetBatch:
        """Return the same batch with its tensors on a device."""
        return replace(
            self,
            head=self.head.to(device),
            tail_logmass=self.tail_logmass.to(device),
            draws=tuple(drawn.to(device) for drawn in self.draws),
            positions=None if self.positions is None else self.positions.to(device),
            label_logprobs=None if self.label_logprobs is None else self.label_logprobs.to(device),
            row_begins=None if self.row_begins is None else self.row_begins.to(device),
        )

    def within(self, where: slice) -> tuple[slice, Tensor]:
        """Return which of its own positions lie among the batch's positions `where`, and their places there.

        Positions [1, 4, 5, 9] and where = slice(4, 8) give slice(1, 3) and [0, 1].
        """
        assert self.positions is not None
        assert self.positions_host is not None
        first, end = (int(torch.searchsorted(self.positions_host, edge)) for edge in (where.start, where.stop))
        return slice(first, end), self.positions[first:end] - where.start

    def temperature_index(self, temperature: float) -> int:
        """Return the column of a captured temperature.

        Raises:
            TrainingError: it was not captured.
        """
        try:
            return temperature_index(self.temperatures, temperature)
        except UsageError as error:
            raise TrainingError(str(error)) from None

    @property
    def has_member(self) -> Tensor:
        """[S] bool: the teacher has a head there, or drawn tokens."""
        found = self.head.counts > 0
        for drawn in self.draws:
            found = found | (drawn.counts > 0)
        return found

    @property
    def begins_chunk(self) -> Tensor:
        """[S] bool: a chunk of the text begins there, since the teacher has a member, or a row does."""
        return self.has_member if self.row_begins is None else self.has_member | self.row_begins

    @property
    def has_only_draws(self) -> bool:
        """Say whether there is no head at all, as in mode `sample`."""
        return bool(self.draws) and self.num_positions > 0 and len(self.head.ids) == 0

    def members(
        self, where: slice, temperature: float, vocab_size: int, dtype: torch.dtype, *, with_draws: bool
    ) -> Members:
        """Return the members of the positions `where` at a captured temperature; without draws the tail stays in the
        bucket.

        Raises:
            TrainingError: the temperature was not captured.
        """
        j = self.temperature_index(temperature)
        ids, logprobs = self.head.padded(where, vocab_size, -torch.inf, dtype)
        tail = self.tail_logmass[where, j].to(dtype)
        if self.temperatures[j] != 1.0 and ids.shape[1]:
            logprobs = _head_at(logprobs, tail, self.temperatures[j])
        if not (self.draws and with_draws):
            return Members(ids, torch.cat([logprobs, tail[:, None]], dim=1), ids.shape[1])
        drawn_ids, multiplicities = self.draws[j].padded(where, vocab_size, 0.0, dtype)
        num_draws = multiplicities.sum(dim=1)
        drawn = tail[:, None] + multiplicities.log() - num_draws.clamp_min(1.0).log()[:, None]
        bucket = tail.masked_fill(num_draws > 0, -torch.inf)
        return Members(
            torch.cat([ids, drawn_ids], dim=1), torch.cat([logprobs, drawn, bucket[:, None]], dim=1), ids.shape[1]
        )


def _head_at(logprobs: Tensor, tail_logmass: Tensor, temperature: float) -> Tensor:
    """Return [C, K] the head's log-probabilities under the full softmax at a temperature whose tail is known."""
    scaled = logprobs / temperature
    log_total = torch.logsumexp(scaled, dim=1)
    head_logmass = torch.log(-torch.expm1(tail_logmass))
    level = (head_logmass - log_total).masked_fill(log_total == -torch.inf, 0.0)
    return scaled + level[:, None]

"""A pack's hidden states as arrays, and a batch's as tensors: only what the losses of the stage read.

States stay 8-bit integers with their scales until they are on the device. Attention is padded to the keys that the
layer keeps at most. A pooled state belongs to a whole row, so a row that was cut has none.
Cost: one copy.

Shape letters: S supervised positions of a pack, R rows with a pooled state, L state layers, D width, A attention
layers, M keys of a query at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.identity.hidden_identity import HiddenIdentity
from shared.payload.hidden import MASS_UNIT, Attention, HiddenStates
from student_train.losses.hidden_layers.representation import Reads

PER_POSITION = ("states_integers", "states_scales", "attention_distances", "attention_codes")
PER_ROW = ("pooled_integers", "pooled_scales")
POOLED_ROW = "pooled_row"


@dataclass(frozen=True, slots=True)
class HiddenReading:
    """What a stage reads of a hidden layer."""

    identity: HiddenIdentity
    reads: frozenset[Reads]

    def pack(self, rows: Sequence[tuple[HiddenStates, int]]) -> dict[str, np.ndarray]:
        """Return the arrays of one pack.

        Args:
            rows: each row's hidden states and how many of its positions the pack has.

        Returns:
            For states: `states_integers` int8 [S, L, D], `states_scales` f32 [S, L]. For attention:
            `attention_distances` int32 [S, A, M] (-1 in padded slots), `attention_codes` int32 [S, A, M]. For pooled:
            `pooled_integers` int8 [R, D], `pooled_scales` f32 [R], `pooled_row` int64 [S], -1 where the row was cut.
        """
        arrays: dict[str, np.ndarray] = {}
        if "states" in self.reads:
            arrays["states_integers"] = _joined(rows, lambda hidden: hidden.states.values.transpose(1, 0, 2))
            arrays["states_scales"] = _joined(rows, lambda hidden: hidden.states.scales.T)
        if "attention" in self.reads:
            most = self.identity.strongest
            grids = [[_grid(attention, most) for attention in hidden.attention] for hidden, _ in rows]
            for i, name in enumerate(("attention_distances", "attention_codes")):
                parts = [
                    np.stack([g[i] for g in grid], axis=1)[:count] for grid, (_, count) in zip(grids, rows, strict=True)
                ]
                arrays[name] = np.concatenate(parts)
        if "pooled" in self.reads:
            whole = [hidden.pooled for hidden, count in rows if count == hidden.num_positions and count]
            pooled = [vectors for vectors in whole if vectors is not None]
            numbers = iter(range(len(pooled)))
            owners = [next(numbers) if count == hidden.num_positions and count else -1 for hidden, count in rows]
            width = self.identity.stored_width
            arrays["pooled_integers"] = (
                np.stack([p.values for p in pooled]) if pooled else np.zeros((0, width), np.int8)
            )
            arrays["pooled_scales"] = np.array([p.scales for p in pooled], np.float32)
            arrays[POOLED_ROW] = np.repeat(np.array(owners, np.int64), [count for _, count in rows])
        return arrays


def _joined(rows: Sequence[tuple[HiddenStates, int]], of: Callable[[HiddenStates], np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate([of(hidden)[:count] for hidden, count in rows]))


def _grid(attention: Attention, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [S, M] and mass codes [S, M], padded with -1 and 0."""
    counts = attention.counts
    filled = np.arange(most) < counts[:, None]
    distances = np.full((len(counts), most), -1, np.int32)
    codes = np.zeros((len(counts), most), np.int32)
    distances[filled], codes[filled] = attention.distances, attention.mass_codes
    return distances, codes


def join_packs(packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the hidden arrays of several packs as one; none where the packs have none."""
    arrays = {
        name: np.concatenate([pack[name] for pack in packs]) for name in (*PER_POSITION, *PER_ROW) if name in packs[0]
    }
    if POOLED_ROW in packs[0]:
        starts = np.cumsum([0, *(len(pack["pooled_scales"]) for pack in packs)])
        owners = [
            np.where(pack[POOLED_ROW] < 0, -1, pack[POOLED_ROW] + start)
            for pack, start in zip(packs, starts, strict=False)
        ]
        arrays[POOLED_ROW] = np.concatenate(owners)
    return arrays


def teacher_states(batch: Mapping[str, Tensor], column: int) -> Tensor:
    """Return [S, D] float32 teacher states of one stored layer."""
    return batch["states_integers"][:, column].float() * batch["states_scales"][:, column, None]


def teacher_pooled(batch: Mapping[str, Tensor]) -> Tensor:
    """Return [R, D] float32 pooled teacher states."""
    return batch["pooled_integers"].float() * batch["pooled_scales"][:, None]


def teacher_masses(batch: Mapping[str, Tensor], column: int, num_visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances [S, M] int64, masses [S, M] and rest [S] of one stored attention layer.

    Where every key that the query sees is stored, what rounding left for the rest belongs to no key and goes to the
    stored ones.

    Args:
        batch: of `join_packs`.
        column: place among the stored attention layers.
        num_visible: [S] keys that each query sees.
    """
    distances = batch["attention_distances"][:, column].to(torch.int64)
    masses = batch["attention_codes"][:, column].float() / MASS_UNIT
    total = masses.sum(-1)
    is_all = ((distances >= 0).sum(-1) >= num_visible) & (total > 0)
    scaled = masses / torch.where(is_all, total, torch.ones_like(total))[:, None]
    return distances, scaled, torch.where(is_all, torch.zeros_like(total), 1.0 - total)

"""Packs to one batch of tensors: concatenated, since `position_ids` keep rows of one pack and of several apart alike.

Cost: one copy. Shape letters: B tokens of all packs, S supervised positions, N head entries, J temperatures, D drawn
    tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from student_train.batch.hidden_batch import join_packs
from student_train.batch.target_batch import teacher_prefixes


def collate(packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Join packs into one batch.

    Returns `input_ids` and `position_ids` int64 [1, B]; `predictor_index`, `labels` and `shift_labels` (the same) int64
    [S]; and the arrays of `pack_targets`, `pack_layers` and `HiddenReading.pack` over all positions, where the packs
    have them.
    Draws, which are stored by temperature and then by position, are joined temperature by temperature.
    """
    starts = np.cumsum([0, *(len(pack["input_ids"]) for pack in packs)])
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.concatenate([pack["input_ids"] for pack in packs])[None],
        "position_ids": np.concatenate([pack["position_ids"] for pack in packs])[None],
        "predictor_index": np.concatenate(
            [pack["predictor_index"] + start for pack, start in zip(packs, starts, strict=False)]
        ),
        "labels": np.concatenate([pack["labels"] for pack in packs]),
    }
    for prefix in teacher_prefixes(name for pack in packs for name in pack):
        arrays |= {f"{prefix}{name}": array for name, array in _joined_targets(packs, prefix).items()}
    arrays |= join_packs(packs)
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    batch["shift_labels"] = batch[
        "labels"
    ]  # the Trainer counts positions by it: every label is supervised, none is shifted
    return batch


def _joined_targets(packs: Sequence[Mapping[str, np.ndarray]], prefix: str) -> dict[str, np.ndarray]:
    """Return the targets of one teacher, whose names begin with `prefix`, over the packs that have them."""
    starts = np.cumsum([0, *(len(pack["labels"]) for pack in packs)]).tolist()
    own = [
        {name.removeprefix(prefix): array for name, array in pack.items() if name.startswith(prefix)}
        | ({"positions": pack[f"{prefix}positions"] + start} if f"{prefix}positions" in pack else {})
        for pack, start in zip(packs, starts, strict=False)
        if f"{prefix}temperatures" in pack
    ]
    arrays = {"temperatures": own[0]["temperatures"]}
    names = ("support_counts", "support_ids", "support_logprobs", "label_logprobs", "row_begins", "tail_logmass")
    for name in (name for name in (*names, "positions") if name in own[0]):
        arrays[name] = np.concatenate([pack[name] for pack in own])
    if "draw_counts" in own[0]:
        arrays["draw_counts"] = np.concatenate([pack["draw_counts"] for pack in own], axis=1)
        for name in ("draw_ids", "draw_multiplicities"):
            arrays[name] = _joined_by_temperature(own, name)
    return arrays


def _joined_by_temperature(packs: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """Return the packs' flat draws by temperature, then pack, then position."""
    ends = [np.cumsum(pack["draw_counts"].sum(axis=1, dtype=np.int64)) for pack in packs]
    pieces = [
        pack[name][end[j - 1] if j else 0 : end[j]]
        for j in range(len(packs[0]["temperatures"]))
        for pack, end in zip(packs, ends, strict=True)
    ]
    return np.concatenate(pieces)

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


def collate(packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Join packs into one batch.

    Returns `input_ids` and `position_ids` int64 [1, B]; `predictor_index`, `labels` and `shift_labels` (the same) int64
    [S]; and the arrays of `pack_targets` and of `HiddenReading.pack` over all positions, where the packs have them.
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
    if "temperatures" in packs[0]:
        arrays["temperatures"] = packs[0]["temperatures"]
        for name in ("support_counts", "support_ids", "support_logprobs", "label_logprobs", "tail_logmass"):
            arrays[name] = np.concatenate([pack[name] for pack in packs])
    if "draw_counts" in packs[0]:
        arrays["draw_counts"] = np.concatenate([pack["draw_counts"] for pack in packs], axis=1)
        for name in ("draw_ids", "draw_multiplicities"):
            arrays[name] = _joined_by_temperature(packs, name)
    arrays |= join_packs(packs)
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    batch["shift_labels"] = batch[
        "labels"
    ]  # the Trainer counts positions by it: every label is supervised, none is shifted
    return batch


def _joined_by_temperature(packs: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """Return the packs' flat draws by temperature, then pack, then position."""
    ends = [np.cumsum(pack["draw_counts"].sum(axis=1, dtype=np.int64)) for pack in packs]
    pieces = [
        pack[name][end[j - 1] if j else 0 : end[j]]
        for j in range(len(packs[0]["temperatures"]))
        for pack, end in zip(packs, ends, strict=True)
    ]
    return np.concatenate(pieces)

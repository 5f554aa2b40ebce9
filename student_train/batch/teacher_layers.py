"""Several teachers of a stage: whose rows each teaches, and their targets in a pack.

All layers are over the same rows in the same order; a row's targets of a layer are decoded only where that layer
teaches its source. Cost: one decode per row and teacher (microseconds).

Shape letters: R rows of all caches, S supervised positions of a pack, S_l those that layer l teaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.cache.cache import Cache
from shared.payload.targets import SparseTargets
from student_train.batch.row_targets import as_trained
from student_train.batch.target_batch import pack_targets


@dataclass(frozen=True, slots=True, eq=False)
class TeacherLayer:
    """One teacher's layer, opened in each of a stage's caches."""

    key: str
    """As the stage's terms and figures call it."""
    caches: tuple[Cache, ...]
    codes: frozenset[int] | None
    """Codes of the sources that it teaches; None for all."""
    share: float
    """Its weight among the teachers of a position in held-out figures."""

    def teaches(self, code: int) -> bool:
        """Return whether it teaches the rows of a source."""
        return self.codes is None or code in self.codes


def pack_layers(
    taught: Mapping[str, Mapping[int, SparseTargets]],
    num_positions: Sequence[int],
    temperatures: Sequence[float],
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """Return the arrays of `pack_targets` per layer as `KEY/NAME`, with `KEY/positions` int64 [S_l], those it teaches.

    A layer that teaches no position of the pack is left out. Rows of 2 and 3 positions of which a layer teaches the
    second give positions [2, 3, 4].

    Args:
        taught: per layer, targets by the row's place in the pack.
        num_positions: supervised positions of each row of the pack.
        temperatures: of the stage's divergences.
        vocab_size: of the tokenizer.
    """
    ends = np.cumsum([0, *num_positions])
    arrays: dict[str, np.ndarray] = {}
    for key, of_rows in taught.items():
        rows = [place for place in of_rows if num_positions[place]]
        if not rows:
            continue
        targets = [as_trained(of_rows[place], num_positions[place], temperatures, vocab_size) for place in rows]
        arrays |= {f"{key}/{name}": array for name, array in pack_targets(targets).items()}
        arrays[f"{key}/positions"] = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows])
    return arrays

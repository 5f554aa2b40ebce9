"""Rows of targets joined into batches, so that numpy is called per batch and not per row, which short rows would pay
for.

Cost: one copy of the arrays; a batch holds at most `BATCH_ENTRIES` head entries and positions, or one row.

Shape letters: S positions of all rows of a batch together, N their head entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from shared.payload.targets import Draws, SparseTargets

BATCH_ENTRIES = 2**18


def row_batches(rows: Iterable[SparseTargets]) -> Iterator[list[SparseTargets]]:
    """Cut rows into lists of neighbours with a bounded number of positions and head entries."""
    batch: list[SparseTargets] = []
    held = 0
    for row in rows:
        size = len(row.ids) + row.num_positions
        if batch and held + size > BATCH_ENTRIES:
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += size
    if batch:
        yield batch


def join_rows(rows: Sequence[SparseTargets]) -> SparseTargets:
    """Return rows of equal temperatures and kinds of draws as if they were one row; at least one."""
    if len(rows) == 1:
        return rows[0]
    return SparseTargets(
        counts=np.concatenate([row.counts for row in rows]),
        ids=np.concatenate([row.ids for row in rows]),
        logprobs=np.concatenate([row.logprobs for row in rows]),
        label_logprobs=np.concatenate([row.label_logprobs for row in rows]),
        tail_logmass=np.concatenate([row.tail_logmass for row in rows]),
        temperatures=rows[0].temperatures,
        draws=tuple(_join_draws([row.draws[j] for row in rows]) for j in range(len(rows[0].draws))),
    )


def _join_draws(draws: Sequence[Draws]) -> Draws:
    return Draws(
        np.concatenate([drawn.counts for drawn in draws]),
        np.concatenate([drawn.ids for drawn in draws]),
        np.concatenate([drawn.multiplicities for drawn in draws]),
    )

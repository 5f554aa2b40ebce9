"""Held-out figures of the student as it is now: KL from the teacher, agreement and perplexity, by source.

The rows are packed like training packs and go through the same patched forward, so that whatever wraps the model
(adapters, autocast, several processes, shards) stays in the path; only that the forward scores positions
(position_scores.py) instead of computing a loss. Rows are measured whole. No random number is drawn and no state of the
training is touched. Each process measures every n-th pack and sums are added up, so that all hold the same figures.
Cost: one forward pass over the rows.

Shape letters: S supervised positions of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import TrainingError
from shared.models.forward.evaluating import evaluating
from student_train.batch.collate import collate
from student_train.batch.dataset import CacheList, build_pack
from student_train.evaluate.heldout_rows import heldout_rows_per_source
from student_train.order.packing import pack_rows
from student_train.student.forward_patch import Objective

_KL, _EQUAL, _NLL, _ACCEPTANCE, _COMPARED, _POSITIONS = range(6)


@dataclass(frozen=True, slots=True)
class HeldoutSet:
    """The rows that a stage is measured on."""

    caches: CacheList
    rows: Mapping[str, Sequence[int]]
    """Row indices in `caches` by source, in the order in which they were chosen."""

    @classmethod
    def choose(cls, caches: CacheList, fraction: float, rows_per_source: int) -> HeldoutSet:
        """Choose at most `rows_per_source` held-out rows of each source, of the rows that count and have a teacher.

        Raises:
            TrainingError: no row is held out.
        """
        starts = np.concatenate([[0], np.cumsum([len(cache) for cache in caches.caches])])
        chosen = heldout_rows_per_source(caches.caches, fraction, rows_per_source, caches.left_out | caches.untaught)
        if not chosen:
            raise TrainingError(
                f"{caches.path}: no row is held out at heldout.fraction {fraction:g}, so there is nothing to evaluate "
                "on; raise it or leave the stage's `evaluate` out"
            )
        return cls(
            caches, {name: [int(starts[cache]) + row for cache, row in places] for name, places in chosen.items()}
        )

    def within(self, longest: float) -> HeldoutSet:
        """Return the rows of at most `longest` tokens.

        Raises:
            TrainingError: there is none.
        """
        fitting = {
            name: [row for row in rows if self.caches.num_tokens[row] <= longest] for name, rows in self.rows.items()
        }
        if not any(fitting.values()):
            raise TrainingError(
                f"{self.caches.path}: every held-out row is longer than the {longest:g} tokens that the student reads; "
                "leave the stage's `evaluate` out, or choose another student"
            )
        return HeldoutSet(self.caches, {name: rows for name, rows in fitting.items() if rows})

    def packs(self, pack_tokens: int) -> list[list[int]]:
        """Return row indices pack by pack, rows whole: a pack is as long as the longest row where that is above
        `pack_tokens`.
        """
        together = [row for rows in self.rows.values() for row in rows]
        lengths = self.caches.num_tokens[np.array(together)]
        packed = pack_rows(lengths, max(pack_tokens, int(lengths.max())))
        ends = packed.offsets.tolist()
        members = packed.members.tolist()
        return [[together[member] for member in members[start:end]] for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Processes:
    """Who measures which packs, and how sums come together."""

    index: int
    count: int
    device: torch.device
    add_up: Callable[[Tensor], Tensor]
    """Sums a tensor over the processes."""


def measure_heldout(
    model: Any, objective: Objective, heldout: HeldoutSet, packs: Sequence[Sequence[int]], processes: Processes
) -> dict[str, Any]:
    """Return `kl_nats`, `top1_agreement`, `acceptance_rate`, `perplexity`, `positions`, `rows`, and the same by
    source under `by_source`.

    Of several teachers, the figures of a position are their mean by weight, and `by_layer` has each one's own.

    Args:
        model: the patched student, with whatever wraps it.
        objective: of the patched forward.
        heldout: what to measure on.
        packs: its rows, packed.
        processes: who measures what.
    """
    codes = {row: code for code, rows in enumerate(heldout.rows.values()) for row in rows}
    layers = heldout.caches.layers
    sums = torch.zeros(len(heldout.rows) + len(layers), 6, dtype=torch.float64)
    rounds = -(-len(packs) // processes.count)
    with scoring(model, objective):
        for index in range(processes.index, rounds * processes.count, processes.count):
            counts = index < len(packs)  # shards are gathered by all processes together, so none may stop earlier
            pack = packs[index if counts else 0]
            rows = [heldout.caches[row] for row in pack]
            limit = max(len(row.token_ids) for row in rows)
            taught = heldout.caches.taught(pack, rows)
            batch = collate([build_pack(rows, limit, (1.0,), heldout.caches.vocab_size, taught=taught)])
            model(**{name: value.to(processes.device) for name, value in batch.items()})
            scores, by_layer = objective.take_scores(), objective.take_scores_by_layer()
            if counts:
                lengths = torch.tensor([row.num_positions for row in rows])
                sums.index_add_(0, torch.tensor([codes[row] for row in pack]).repeat_interleave(lengths), scores)
                for number, layer in enumerate(layers, len(heldout.rows)):
                    sums[number] += by_layer[layer.key].sum(0) if layer.key in by_layer else 0.0
    added = processes.add_up(sums.to(processes.device)).cpu().numpy()
    by_source = {name: _figures(added[code], len(rows)) for code, (name, rows) in enumerate(heldout.rows.items())}
    found = {**_figures(added[: len(heldout.rows)].sum(axis=0), len(codes)), "by_source": by_source}
    return {**found, "by_layer": _by_layer(heldout, added[len(heldout.rows) :])} if layers else found


def _by_layer(heldout: HeldoutSet, sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the figures of each of several teachers on the rows that it teaches, without those that teach none."""
    sources = heldout.caches.source_names
    rows = [
        sum(len(rows) for name, rows in heldout.rows.items() if layer.teaches(sources.index(name)))
        for layer in heldout.caches.layers
    ]
    layers = zip(heldout.caches.layers, sums, rows, strict=True)
    return {layer.key: _figures(added, count) for layer, added, count in layers if count}


@contextmanager
def scoring(model: Any, objective: Objective) -> Iterator[None]:
    """Let forward passes score positions, without dropout or gradient; restore what was before."""
    with evaluating(model):
        objective.is_scoring = True
        try:
            yield
        finally:
            objective.is_scoring = False
            objective.take_scores()


def _figures(sums: np.ndarray, num_rows: int) -> dict[str, Any]:
    positions = float(sums[_POSITIONS])
    compared = max(float(sums[_COMPARED]), 1.0)  # a layer in another tokenizer has positions without a head
    nll, acceptance = float(sums[_NLL]) / positions, float(sums[_ACCEPTANCE]) / compared
    return {
        "kl_nats": float(sums[_KL]) / compared,
        "top1_agreement": float(sums[_EQUAL]) / compared,
        "acceptance_rate": None if math.isnan(acceptance) else acceptance,
        "perplexity": math.exp(nll) if nll < 700 else None,
        "positions": int(positions),
        "rows": num_rows,
    }

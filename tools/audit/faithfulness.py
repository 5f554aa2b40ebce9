"""Are the stored distributions the teacher's: random rows are scored live again and compared position by position.

Three comparisons with the same live distributions, each in the same figures:
- stored: what the cache has;
- control: the teacher against itself run twice, once alone and once in a padded batch with other rows: what rounding
  alone does;
- codec: the live distributions captured and encoded as the layer's are, then decoded: what storing them does.
KL is that of the compared head and tail bucket from the live distribution on the same masses, in nats. A row is
unfaithful when its mean KL, its worst position's KL, its worst label or its worst tail lies above a fixed bound and far
above control and codec. A layer of draws alone (mode sample) has no heads: labels are all that can be compared.

Cost: two forward passes per row. Shape letters: S positions of a row, C of a chunk, V entries, N head entries, J
    temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.payload.targets import SparseTargets
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.transformers.transformers_model import CausalModel
from tools.audit.capturing import capture_chunk, join_columns
from tools.audit.live import dense_logprobs

MEAN_KL, WORST_KL, WORST_LABEL, WORST_TAIL = 0.01, 0.5, 1.0, 0.1
"""Bounds: nats per position in the mean, nats at one position, nats of a label, probability of a tail."""
FAR_ABOVE = 10.0
"""Times the same figure of control and codec."""
BATCH_ROWS = 4


KEYS = ("mean_kl", "worst_kl", "worst_label", "worst_tail")


@dataclass(slots=True)
class Comparison:
    """Figures of compared positions, row by row."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    top1_equal: int = 0
    top1_known: int = 0

    def begin_row(self) -> None:
        """Count what is added from here on as another row."""
        self.rows.append(dict.fromkeys(("kl", *KEYS, "worst_logprob"), 0.0) | {"positions": 0, "worst_position": 0})

    def add(self, targets: SparseTargets, live: NDArray[np.float64], labels: NDArray[np.int32]) -> None:
        """Compare some positions of the row with live log-probabilities [C, V]."""
        row, known = self.rows[-1], targets.counts > 0
        kl, worst_logprob, worst_tail = compare(targets, live)
        label = np.abs(targets.label_logprobs - live[np.arange(len(live)), labels])
        if float(kl.max(initial=0.0)) > row["worst_kl"]:
            row |= {"worst_kl": float(kl.max()), "worst_position": row["positions"] + int(kl.argmax())}
        row["kl"] += float(kl.sum())
        row["positions"] += len(live)
        row["mean_kl"] = row["kl"] / row["positions"]
        for key, value in (
            ("worst_logprob", worst_logprob),
            ("worst_label", float(label.max(initial=0.0))),
            ("worst_tail", worst_tail),
        ):
            row[key] = max(row[key], value)
        first = targets.ids[targets.offsets()[:-1][known]]
        self.top1_equal += int((live[known].argmax(-1) == first).sum())
        self.top1_known += int(known.sum())

    def figures(self) -> dict[str, Any]:
        """Return the figures over all rows."""
        positions = sum(row["positions"] for row in self.rows)
        return {
            "mean_kl": math.fsum(row["kl"] for row in self.rows) / max(positions, 1),
            **{key: self.most(key) for key in ("worst_kl", "worst_logprob", "worst_label", "worst_tail")},
            "top1_agreement": self.top1_equal / self.top1_known if self.top1_known else None,
            "positions": positions,
        }

    def most(self, key: str) -> float:
        """Return the largest figure of any row."""
        return max((float(row[key]) for row in self.rows), default=0.0)


def audit_faithfulness(cache: Cache, model: CausalModel, chosen: Sequence[int]) -> dict[str, Any]:
    """Compare rows of a cache with the live teacher.

    Returns:
        stored, control, codec: mean_kl, worst_kl, worst_logprob, worst_label (nats), worst_tail (probability),
        top1_agreement;
        unfaithful: the rows that are, worst first; rows, bounds.
    """
    identity = cache.layer
    assert identity is not None
    codec = identity.make_codec()
    layout = ColumnLayout.of(identity, identity.vocab_size)
    stored, control, decoded = Comparison(), Comparison(), Comparison()
    rows = [cache[index] for index in chosen]
    for place, row in enumerate(rows):
        targets = row.targets
        assert targets is not None
        beside = [rows[(place + step) % len(rows)] for step in range(1, BATCH_ROWS)]
        for comparison in (stored, control, decoded):
            comparison.begin_row()
        chunks = zip(dense_logprobs(model, row), dense_logprobs(model, row, beside=beside), strict=True)
        for (where, alone), (_, batched) in chunks:
            live = join_columns([capture_chunk(alone, row, where, layout)], layout)
            labels = row.labels()[where]
            stored.add(positions_of(targets, where), alone.numpy(), labels)
            control.add(live, batched.numpy(), labels)
            decoded.add(codec.decode(codec.encode(live), live.num_positions), alone.numpy(), labels)
    bounds = {
        key: max(bound, FAR_ABOVE * max(control.most(key), decoded.most(key)))
        for key, bound in (
            ("mean_kl", MEAN_KL),
            ("worst_kl", WORST_KL),
            ("worst_label", WORST_LABEL),
            ("worst_tail", WORST_TAIL),
        )
    }
    unfaithful = [
        {
            "row": int(index),
            "where": cache.where(index),
            "source": row.source,
            **{key: value for key, value in figures.items() if key != "kl"},
        }
        for index, row, figures in zip(chosen, rows, stored.rows, strict=True)
        if any(figures[key] > bound for key, bound in bounds.items())
    ]
    return {
        "rows": len(rows),
        "stored": stored.figures(),
        "control": control.figures(),
        "codec": decoded.figures(),
        "bounds": bounds,
        "unfaithful": sorted(unfaithful, key=lambda row: -row["mean_kl"]),
    }


def positions_of(targets: SparseTargets, where: slice) -> SparseTargets:
    """Return some positions of a row's targets, without draws."""
    entries = slice(*targets.offsets()[[where.start, where.stop]].tolist())
    return SparseTargets(
        counts=targets.counts[where],
        ids=targets.ids[entries],
        logprobs=targets.logprobs[entries],
        label_logprobs=targets.label_logprobs[where],
        tail_logmass=targets.tail_logmass[where],
        temperatures=targets.temperatures,
    )


def compare(targets: SparseTargets, live: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """Compare targets with live log-probabilities [C, V].

    Returns:
        KL [C] in nats on head and tail bucket at T = 1 (0 without a head), the largest error of a log-probability in
        nats, and of a tail's probability at any captured temperature.
    """
    counts = targets.counts
    position = np.repeat(np.arange(len(counts)), counts)
    of_live = live[position, targets.ids]
    kl = np.zeros(len(counts))
    np.add.at(kl, position, np.exp(targets.logprobs.astype(np.float64)) * (targets.logprobs - of_live))
    worst_tail = 0.0
    for j, temperature in enumerate(targets.temperatures):
        tail = np.exp(targets.tail_logmass[:, j].astype(np.float64))
        outside = np.exp(at_temperature(live, temperature))
        outside[position, targets.ids] = 0.0
        live_tail = outside.sum(-1)
        worst_tail = max(worst_tail, float(np.abs(tail - live_tail)[counts > 0].max(initial=0.0)))
        if temperature == 1.0:
            has_both = (tail > 0) & (counts > 0)
            kl[has_both] += tail[has_both] * np.log(tail[has_both] / np.maximum(live_tail[has_both], 1e-300))
    return kl, float(np.abs(targets.logprobs - of_live).max(initial=0.0)), worst_tail


def at_temperature(logprobs: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return log-probabilities [C, V] at another temperature."""
    if temperature == 1.0:
        return logprobs
    scaled = logprobs / temperature
    scaled -= scaled.max(-1, keepdims=True)
    found: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return found

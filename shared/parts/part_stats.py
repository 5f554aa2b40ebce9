"""Figures of a part that its record keeps, so that statistics of a cache need no part opened.

Entropy is that of head entries with the tail as one bucket, a lower bound of the distribution's own; it and the label's
negative log-probability are in nats at temperature 1. Histograms are lists of counts. Cost: one pass over the head
entries.

Shape letters: S positions, N head entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from shared.parts.sequences import SequenceRow
from shared.payload.ragged import segment_sum
from shared.payload.row_batches import join_rows, row_batches
from shared.payload.targets import SparseTargets

ENTROPY_BIN_NATS = 0.25
ENTROPY_BINS = 64
"""Bin i counts positions with entropy within [0.25 i, 0.25 (i + 1)); the last bin takes the rest."""
SUPPORT_BINS = 18
"""Bin 0 counts positions without head; bin i >= 1 those with 2^(i-1) <= entries < 2^i; the last bin takes the rest."""

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Sum = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Fields of a JSON document of a cache: no conversions, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Figures(Strict):
    """What the record of every part counts."""

    rows: _Count
    positions: _Count


class SourceFigures(_Figures):
    """Rows, positions and tokens."""

    tokens: _Count


class SequencesFigures(SourceFigures):
    """Figures of a sequences part."""

    sources: dict[str, SourceFigures]
    finish_reasons: dict[str, _Count]


class HiddenFigures(_Figures):
    """Figures of a hidden part."""

    blob_bytes: _Count


class TargetsFigures(HiddenFigures):
    """Figures of a targets part."""

    support_sum: _Count
    entropy_nats_sum: _Sum
    tail_mass_sum: _Sum
    label_nll_nats_sum: _Sum
    impossible_labels: _Count
    entropy_histogram: Annotated[list[_Count], Field(min_length=ENTROPY_BINS, max_length=ENTROPY_BINS)]
    support_histogram: Annotated[list[_Count], Field(min_length=SUPPORT_BINS, max_length=SUPPORT_BINS)]
    placed_mass_sum: _Sum = 0.0
    """Of a layer in another tokenizer: mass of its heads, and next what the teacher's had at the same positions."""
    teacher_mass_sum: _Sum = 0.0


STATS_OF: dict[str, type[_Figures]] = {
    "sequences": SequencesFigures,
    "targets": TargetsFigures,
    "hidden": HiddenFigures,
}
"""Shape of a record's `stats` by kind of part."""


def sequences_stats(rows: Sequence[SequenceRow]) -> dict[str, Any]:
    """Return rows, tokens, positions, cut answers and figures per source of a sequences part."""
    sources: dict[str, dict[str, int]] = {}
    reasons: dict[str, int] = {}
    for row in rows:
        figures = sources.setdefault(row.source, {"rows": 0, "tokens": 0, "positions": 0})
        figures["rows"] += 1
        figures["tokens"] += len(row.token_ids)
        figures["positions"] += row.num_positions
        reasons[row.finish_reason] = reasons.get(row.finish_reason, 0) + 1
    return {
        "rows": len(rows),
        "tokens": sum(figures["tokens"] for figures in sources.values()),
        "positions": sum(figures["positions"] for figures in sources.values()),
        "sources": sources,
        "finish_reasons": reasons,
    }


def targets_stats(targets: Iterable[SparseTargets], blob_bytes: int) -> dict[str, Any]:
    """Return positions, support, entropy, tail and label figures of a targets part."""
    total: dict[str, Any] = {
        "rows": 0,
        "positions": 0,
        "blob_bytes": blob_bytes,
        "support_sum": 0,
        "entropy_nats_sum": 0.0,
        "tail_mass_sum": 0.0,
        "label_nll_nats_sum": 0.0,
        "impossible_labels": 0,
        "entropy_histogram": [0] * ENTROPY_BINS,
        "support_histogram": [0] * SUPPORT_BINS,
    }
    for rows in row_batches(targets):
        add_figures(total, _batch_stats(join_rows(rows), len(rows)))
    return total


def add_figures(total: dict[str, Any], figures: Mapping[str, Any]) -> None:
    """Add figures into `total`: numbers, lists of numbers element by element, and mappings of them."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            add_figures(total.setdefault(name, {}), value)
        elif isinstance(value, list):
            before = total.get(name, [])
            length = max(len(before), len(value))
            total[name] = [sum(part[i] for part in (before, value) if i < len(part)) for i in range(length)]
        else:
            total[name] = total.get(name, 0) + value


def targets_stats_problem(said: Mapping[str, Any], counted: Mapping[str, Any], gap_step: float) -> str | None:
    """Say which figure of a targets part is not what was counted from its decoded blobs, if any.

    Args:
        said: figures of the targets before they were quantised.
        counted: `targets_stats` of what was decoded: counts are the same, sums of reals are near.
        gap_step: quantisation step of the layer in nats.
    """
    near = counted["positions"] * (gap_step + 1e-3) + 1e-6
    for name in ("rows", "positions", "blob_bytes", "support_sum", "impossible_labels", "support_histogram"):
        if said[name] != counted[name]:
            return f"{name} {said[name]} where {counted[name]} are counted"
    for name in ("entropy_nats_sum", "tail_mass_sum"):
        if not abs(said[name] - counted[name]) <= near:
            return f"{name} {said[name]:.6g} where {counted[name]:.6g} are counted"
    total = sum(said["entropy_histogram"])
    return None if total == counted["positions"] else f"an entropy_histogram of {total} positions"


def position_entropy_nats(targets: SparseTargets) -> NDArray[np.float64]:
    """Return [S] entropy in nats of head entries and one bucket for the tail, at temperature 1."""
    logprobs = targets.logprobs.astype(np.float64)
    head = segment_sum(-np.exp(logprobs) * logprobs, targets.counts)
    tail = targets.tail_logmass[:, targets.temperatures.index(1.0)].astype(np.float64)
    return head - np.exp(tail) * np.where(np.isneginf(tail), 0.0, tail)


def _batch_stats(targets: SparseTargets, num_rows: int) -> dict[str, Any]:
    entropy = position_entropy_nats(targets)
    tail = np.exp(targets.tail_logmass[:, targets.temperatures.index(1.0)].astype(np.float64))
    labels = targets.label_logprobs[np.isfinite(targets.label_logprobs)].astype(np.float64)
    entropy_bin = np.clip((entropy / ENTROPY_BIN_NATS).astype(np.int64), 0, ENTROPY_BINS - 1)
    support_bin = np.minimum(np.frexp(targets.counts.astype(np.float64))[1], SUPPORT_BINS - 1)
    return {
        "rows": num_rows,
        "positions": targets.num_positions,
        "support_sum": int(targets.counts.sum(dtype=np.int64)),
        "entropy_nats_sum": float(entropy.sum()),
        "tail_mass_sum": float(tail.sum()),
        "label_nll_nats_sum": float(-labels.sum()),
        "impossible_labels": targets.num_positions - len(labels),
        "entropy_histogram": np.bincount(entropy_bin, minlength=ENTROPY_BINS).tolist(),
        "support_histogram": np.bincount(support_bin, minlength=SUPPORT_BINS).tolist(),
    }

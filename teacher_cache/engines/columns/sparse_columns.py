"""Columns of scored rows, as an engine returns them, into the arrays of `SparseTargets`; numpy only, no loop over
positions.

Two kinds of rows: those that the tail plug-in filled (sentinel ids carry log tail masses; heads are already ordered and
cut), and stock top-k rows (order, cut and tail are worked out here; only at temperature 1, where the tail is 1 minus
the head's sum).
Cost: one core turns about a million positions of 64 entries per second.

Shape letters: S supervised positions, W columns, K head entries, J temperatures, m draws, N head entries of the row
together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.parts.sequences import spans_index
from shared.payload.targets import Draws, SparseTargets
from teacher_cache.engines.columns.column_layout import ColumnLayout

Ids = NDArray[np.int32]
Values = NDArray[np.float32]

SMALLEST_DERIVED_TAIL = 2.0**-24
"""Below this, 1 minus a sum of float32 probabilities says nothing."""


def predicting_rows(spans: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return [S] rows of a scored sequence, row t - 1 holding the distribution that predicts token t of each span."""
    return spans_index(spans).astype(np.int64) - 1


def targets_from_plugin(ids: Ids, values: Values, layout: ColumnLayout) -> SparseTargets:
    """Read [S, 1 + layout.num_extra] rows that the tail plug-in filled.

    Raises:
        EngineError: a row was not filled by the plug-in.
    """
    if ids.shape[1] != 1 + layout.num_extra:
        raise EngineError(
            f"a scored row has {ids.shape[1]} columns; expected {1 + layout.num_extra} from the tail plug-in"
        )
    sentinels = np.asarray(layout.sentinels, dtype=np.int32)
    if not (ids[:, layout.tail_start : layout.draw_start] == sentinels).all():
        raise EngineError(
            "a scored row holds plain top-k entries where tail masses were expected; score with one capture per engine"
        )
    head_ids = ids[:, 1 : layout.tail_start]
    head_logprobs = values[:, 1 : layout.tail_start]
    counts, head_ids, head_logprobs = _flatten(head_ids, head_logprobs, head_ids >= 0)
    draws = (
        ids[:, layout.draw_start :].reshape(len(ids), len(layout.temperatures), layout.num_draws)
        if layout.num_draws
        else None
    )
    return SparseTargets(
        counts=counts,
        ids=head_ids,
        logprobs=head_logprobs,
        label_logprobs=np.minimum(values[:, 0], 0.0).astype(np.float32),
        tail_logmass=np.ascontiguousarray(values[:, layout.tail_start : layout.draw_start], dtype=np.float32),
        temperatures=layout.temperatures,
        draws=tuple(count_draws(draws[:, j]) for j in range(draws.shape[1])) if draws is not None else (),
    )


def targets_from_stock(ids: Ids, values: Values, layout: ColumnLayout) -> SparseTargets:
    """Read [S, 1 + K] stock rows at temperature 1; the tail is 1 minus the head's sum, which float32 rounds at 1e-7."""
    assert layout.stock_columns_suffice
    head_ids, head_logprobs = _order(ids[:, 1:], values[:, 1:])
    probabilities = np.exp(head_logprobs, dtype=np.float64)
    keep = head_ids < layout.vocab_size
    if layout.mass < 1.0:
        keep &= probabilities.cumsum(-1) - probabilities < layout.mass
    is_whole = keep.all(-1) & (layout.num_head == layout.vocab_size)
    if layout.has_label:
        labels, smallest = ids[:, :1], head_logprobs.min(-1, keepdims=True, where=keep, initial=0)
        keep = np.c_[keep, ~((head_ids == labels) & keep).any(-1) & (labels[:, 0] < layout.vocab_size)]
        head_ids, head_logprobs = np.c_[head_ids, labels], np.c_[head_logprobs, np.minimum(values[:, :1], smallest)]
        probabilities = np.exp(head_logprobs, dtype=np.float64)
    tail = 1.0 - (probabilities * keep).sum(-1)
    tail = np.maximum(tail, SMALLEST_DERIVED_TAIL)
    tail[is_whole] = 0.0  # padding, if any, is not worth telling from rounding
    with np.errstate(divide="ignore"):
        tail_logmass = np.log(tail)[:, None].astype(np.float32)
    counts, head_ids, head_logprobs = _flatten(head_ids, head_logprobs, keep)
    label_logprobs = np.minimum(values[:, 0], 0.0).astype(np.float32)
    return SparseTargets(counts, head_ids, head_logprobs, label_logprobs, tail_logmass)


def count_draws(drawn: Ids) -> Draws:
    """Count [S, m] drawn ids (below 0: no draw) as distinct ids, ascending within a position, with multiplicities."""
    ordered = np.sort(drawn, axis=1)
    first = np.ones(ordered.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first_flat = np.flatnonzero(first)
    runs = np.diff(first_flat, append=ordered.size)  # a row always starts a run, so none crosses rows
    ids = ordered.reshape(-1)[first_flat]
    real = ids >= 0
    counts = (
        np.bincount(first_flat[real] // ordered.shape[1], minlength=len(ordered))
        if ordered.size
        else np.zeros(len(ordered))
    )
    return Draws(counts.astype(np.int32), ids[real].astype(np.int32), runs[real].astype(np.int32))


def _flatten(ids: Ids, logprobs: Values, keep: NDArray[np.bool_]) -> tuple[Ids, Ids, Values]:
    """Return counts [S] and the kept entries of [S, K] as flat arrays [N]."""
    counts = keep.sum(-1, dtype=np.int32)
    if keep.all():
        return counts, ids.astype(np.int32).reshape(-1), logprobs.astype(np.float32).reshape(-1)
    kept = np.flatnonzero(keep)
    return counts, ids.reshape(-1)[kept].astype(np.int32), logprobs.reshape(-1)[kept].astype(np.float32)


def _order(ids: Ids, logprobs: Values) -> tuple[Ids, Values]:
    """Order rows by descending log-probability, ties by ascending id; rows that already are so cost one comparison."""
    falls = logprobs[:, 1:] < logprobs[:, :-1]
    ties_in_order = (logprobs[:, 1:] == logprobs[:, :-1]) & (ids[:, 1:] > ids[:, :-1])
    wrong = np.flatnonzero(~(falls | ties_in_order).all(-1))
    if not len(wrong):
        return ids, logprobs
    ids, logprobs = ids.copy(), logprobs.copy()
    order = np.lexsort((ids[wrong], -logprobs[wrong]), axis=-1)
    ids[wrong] = np.take_along_axis(ids[wrong], order, 1)
    logprobs[wrong] = np.take_along_axis(logprobs[wrong], order, 1)
    return ids, logprobs

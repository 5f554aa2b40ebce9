"""From the entries that others stored to the targets of a row: sorted, checked, with what is left as the tail.

Entries of no mass (below exp(-100)) are padding of their formats and belong to no head; an id outside the tokenizer is
one of a padded output layer and joins the tail. Rounding may make a head weigh more than 1: its tail is then empty, and
beyond the codec's tolerance the head is divided by its mass. Both are counted.
Cost: one sort of each position's entries.

Shape letters: S positions, K most entries of one, N entries that are kept.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.payload.targets import SparseTargets
from tools.cache.foreign.foreign_row import ForeignRow

LEAST_LOGPROB = -100.0
"""Entries below it have no mass: exp(-100) is 0 beside any probability in float32."""
_MOST_MASS = 1.005
"""Heads that weigh more are divided by their mass; the codec takes 1 percent."""
_MOST_LABEL = 0.005
"""What rounding may make of a certain token's log-probability."""


def to_targets(row: ForeignRow, vocab_size: int, *, tail: str, counts: Counter[str]) -> SparseTargets:
    """Return a row's targets at temperature 1.

    Args:
        row: with S tokens that have entries.
        vocab_size: ids of the tokenizer lie below it.
        tail: `unknown` where the values are right up to a factor per position alone.
        counts: gains positions, in_head (labels that the head names), above_one, divided, outside (entries).

    Raises:
        DamagedError: a value is NaN or +inf, an id is negative or named twice, or a head weighs far more than 1.
    """
    logprobs = row.logprobs
    if bool((np.isnan(logprobs) | (logprobs == np.inf)).any()):
        raise DamagedError(f"{row.where} has a log-probability that is no number; it was altered")
    there = logprobs > LEAST_LOGPROB
    if bool((row.ids[there] < 0).any()):
        raise DamagedError(f"{row.where} names a negative token id; it was altered")
    kept = there & (row.ids < vocab_size)
    counts["outside"] += int((there & ~kept).sum())
    sortable = np.where(kept, logprobs, -np.inf)
    order = np.argsort(-sortable, axis=1, kind="stable")
    ids, sortable = np.take_along_axis(row.ids, order, 1), np.take_along_axis(sortable, order, 1)
    sizes = kept.sum(axis=1).astype(np.int32)
    _refuse_twice(row, ids, sizes)
    mass = np.exp(sortable).sum(axis=1)
    labels = _label_logprobs(row, ids, sortable)
    counts["positions"] += len(sizes)
    counts["in_head"] += int(((ids == row.token_ids[row.predicted][:, None]) & (sortable > -np.inf)).any(axis=1).sum())
    counts["above_one"] += int((mass > 1.0).sum())
    too_heavy = mass > _MOST_MASS
    if bool(too_heavy.any()):
        if tail != "unknown" and float(mass.max()) > 2.0:
            raise DamagedError(
                f"{row.where} has entries whose probabilities add up to {float(mass.max()):.4g}, so they are no "
                "log-probabilities of one distribution; with --tail unknown they are read as right up to a factor"
            )
        counts["divided"] += int(too_heavy.sum())
        shift = np.where(too_heavy, np.log(np.where(too_heavy, mass, 1.0)), 0.0)
        sortable, labels = sortable - shift[:, None], labels - shift
        mass = np.where(too_heavy, 1.0, mass)
    if bool((labels > _MOST_LABEL).any()):
        raise DamagedError(
            f"{row.where} gives token {int(row.predicted[labels.argmax()])} the log-probability "
            f"{float(labels.max()):.4g} beside its alternatives; expected none above 0"
        )
    filled = np.arange(ids.shape[1]) < sizes[:, None]
    with np.errstate(divide="ignore"):
        rest = np.log1p(-np.minimum(mass, 1.0))
    rest[sizes == 0] = 0.0
    return SparseTargets(
        sizes,
        ids[filled].astype(np.int32),
        sortable[filled].astype(np.float32),
        np.minimum(labels, 0.0).astype(np.float32),
        rest[:, None].astype(np.float32),
    )


def _refuse_twice(row: ForeignRow, ids: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
    """Refuse a position that names an id twice."""
    width = ids.shape[1]
    unlike = np.where(np.arange(width) < sizes[:, None], ids, -1 - np.arange(width))  # padding repeats nothing
    unlike.sort(axis=1)
    twice = (unlike[:, 1:] == unlike[:, :-1]).any(axis=1)
    if bool(twice.any()):
        place = int(row.predicted[twice.argmax()])
        raise DamagedError(f"{row.where} names a token id twice before token {place}; every entry is wanted once")


def _label_logprobs(row: ForeignRow, ids: NDArray[np.int64], logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [S] natural logs of the labels: as stored, else from the head, else -inf, which means not known."""
    named = ids == row.token_ids[row.predicted][:, None]
    found: NDArray[np.float64] = np.where(named, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    if row.label_logprobs is None:
        return found
    return np.where(np.isnan(row.label_logprobs), found, row.label_logprobs)

"""How far several teachers are from one another, from the cache alone, on the held-out rows of the evaluation.

KL(of || to) in nats per position: the least that fits both heads. The tokens that both hold stand alone; of the others
`of` says how likely those are that are in its head alone, `to` in its own, and what the other side gives them lies
within its tail, where it is taken to be as like as it can be. So two teachers that are sure of different tokens are far
apart, which one bucket for all that is not common would hide. A lower bound on the full KL (data processing). Kept in
OUTPUT_DIR/evaluate/teachers/distances.json and reused for the same rows of the same layers.

Cost: a decode of the held-out rows per layer; microseconds per row and pair.
Shape letters: S positions of a row, N and M head entries of two teachers, C entries that both hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.rows_left_out import rows_left_out
from shared.payload.ragged import position_of
from shared.payload.targets import SparseTargets
from shared.recipe.recipe import Recipe
from student_train.evaluate.heldout_rows import heldout_rows
from tools.evaluate.results.results import read_kept, result_path, taught_layers, write_result

_FORMAT = 2
"""Raised whenever figures would come out differently for the same inputs."""
NEAREST_FACTOR = 3.0
"""Of three teachers or more, one is far whose nearest other is so many times as far as the others' usually are."""


def measure_distances(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """Measure a recipe's teachers against one another, or reuse what is kept; None where they are fewer than two.

    Returns:
        `pairs`: of, to, kl_nats, top1_agreement, positions, rows of each ordered pair; `without_head`: teachers that
        cannot be compared, since their layers hold drawn tokens alone or do not know their tail.

    Raises:
        CacheError: a cache cannot be read.
    """
    layers = taught_layers(recipe)
    if len(layers) < 2 or recipe.heldout.fraction == 0:
        return None
    opened = {name: [Cache.open(path, layer) for path in recipe.cache] for name, layer in layers.items()}
    first = next(iter(opened.values()))
    rows = heldout_rows(first, recipe.heldout.fraction, recipe.evaluate.heldout_rows, rows_left_out(first, recipe).rows)
    path = result_path(recipe, "teachers/distances")
    identity = {
        "layers": {name: [cache.cache_id for cache in caches] for name, caches in opened.items()},
        "fraction": recipe.heldout.fraction,
        "max_rows": recipe.evaluate.heldout_rows,
        "rows": [list(place) for place in rows],
        "format": _FORMAT,
    }
    if (kept := read_kept(path, identity)) is not None:
        return kept
    unlike = [name for name, caches in opened.items() if not all(_is_whole(cache) for cache in caches)]
    able = [name for name in opened if name not in unlike]
    pairs = [_pair(of, to, opened[of], opened[to], rows) for of, to in permutations(able, 2)] if rows else []
    found = {"identity": identity, "pairs": pairs, "without_head": unlike}
    write_result(path, found)
    for pair in pairs:
        say(f"teachers: {pair['of']} is {pair['kl_nats']:.4f} nats from {pair['to']}")
    return found


def _is_whole(cache: Cache) -> bool:
    """Tell whether a layer has heads and the mass outside them."""
    return cache.layer is not None and cache.layer.mode != "sample" and cache.layer.tail != "unknown"


def _pair(of: str, to: str, mine: list[Cache], other: list[Cache], rows: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the figures of one ordered pair over (cache, row) places."""
    kl, equal, positions = 0.0, 0, 0
    for which, row in rows:
        p, q = mine[which][row].targets, other[which][row].targets
        assert p is not None
        assert q is not None
        kl += float(position_distances(p, q).sum())
        equal += int((top_tokens(p) == top_tokens(q)).sum())
        positions += p.num_positions
    shares = {"kl_nats": kl / positions, "top1_agreement": equal / positions} if positions else {}
    return {"of": of, "to": to, **shares, "positions": positions, "rows": len(rows)}


def position_distances(p: SparseTargets, q: SparseTargets) -> NDArray[np.float64]:
    """Return [S] the least KL(p || q) in nats at T = 1 of distributions that have these heads and tails.

    Heads {1: 0.5, 2: 0.3} and {1: 0.25, 3: 0.5} share token 1. Of p's tail of 0.2 all goes to token 3, which q holds
    for likely, and p's token 2 has all of q's tail of 0.25:
    0.5 log(0.5 / 0.25) + 0.3 log(0.3 / 0.25) + 0.2 log(0.2 / 0.5).
    """
    mine, theirs = (position_of(one.counts).astype(np.int64) << 32 | one.ids.astype(np.int64) for one in (p, q))
    _, in_p, in_q = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
    where = mine[in_p] >> 32
    log_p, log_q = p.logprobs[in_p].astype(np.float64), q.logprobs[in_q].astype(np.float64)
    common = np.bincount(where, np.exp(log_p) * (log_p - log_q), p.num_positions)
    alone_p, alone_q = _alone(p, in_p), _alone(q, in_q)
    tail_p, tail_q = (np.exp(one.tail_logmass[:, one.temperatures.index(1.0)].astype(np.float64)) for one in (p, q))
    rest = alone_p + tail_p
    in_head_of_q = np.minimum(tail_p, rest * alone_q / np.maximum(alone_q + tail_q, _TINY))
    found: NDArray[np.float64] = common + _term(rest - in_head_of_q, tail_q) + _term(in_head_of_q, alone_q)
    return found


def _term(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p log(p / q), 0 where p is."""
    return np.where(p > 0, p * np.log(np.maximum(p, _TINY) / np.maximum(q, _TINY)), 0.0)


_TINY = float(np.exp(-100.0))
"""Stands for an empty bucket, as in the losses."""


def _alone(targets: SparseTargets, common: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return [S] the mass of the head entries that are not in common."""
    alone = np.ones(len(targets.ids), np.bool_)
    alone[common] = False
    masses = np.where(alone, np.exp(targets.logprobs.astype(np.float64)), 0.0)
    return np.bincount(position_of(targets.counts), masses, targets.num_positions).astype(np.float64)


def top_tokens(targets: SparseTargets) -> NDArray[np.int64]:
    """Return [S] the most likely token, -1 where there is no head."""
    first = targets.offsets()[:-1]
    padded = np.append(targets.ids.astype(np.int64), -1)
    return np.where(targets.counts > 0, padded[np.minimum(first, len(targets.ids))], -1)


def far_teachers(distances: Mapping[tuple[str, str], float], from_start: Mapping[str, float]) -> list[str]:
    """Return a sentence for each teacher that is far from all the others.

    A teacher is far where every other one is farther from it than the student is before it has learned anything; of
    three or more also where its nearest is `NEAREST_FACTOR` times as far as the others' nearest are in the median.
    `distances` are KL(of || to) in nats by (of, to), `from_start` those to the student's start, where measured.
    """
    names = list(dict.fromkeys(of for of, _ in distances))
    nearest = {name: min(kl for (of, _), kl in distances.items() if of == name) for name in names}
    found = []
    for name, kl in nearest.items():
        others = [nearest[other] for other in names if other != name]
        if kl > from_start.get(name, float("inf")):
            why = f"the untrained student is nearer ({from_start[name]:.4f})"
        elif len(others) > 1 and kl > NEAREST_FACTOR * statistics.median(others):
            why = f"the others' nearest are {statistics.median(others):.4f} apart in the median"
        else:
            continue
        found.append(f"{name} is far from all other teachers: {kl:.4f} nats from the nearest, and {why}")
    return found

"""A synthetic teacher with the statistics that cost a codec most: random ids, no context, no repetition.

Ids: 70 % drawn from a Zipf law over the vocabulary (weight 1 / (rank + 20)), 30 % uniform, without repetition within a
position, so that they hardly compress: the worst case. Log-probabilities: a power law with a random exponent and offset
per position and 15 % noise, sorted, over 4,000 entries, of which the top k are kept; the rest is the tail. Labels are
drawn from the whole. Cost: about 50 microseconds per position.

Shape letters: P positions, K head entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.payload.targets import SparseTargets

VOCAB_SIZE = 151_936
RANKED_ENTRIES = 4000


def make_targets(
    num_positions: int, k: int = 64, seed: int = 0, temperatures: tuple[float, ...] = (1.0,)
) -> SparseTargets:
    """Return one row of `num_positions` synthetic positions with `k` head entries each; equal arguments give equal
    bits.
    """
    rng = np.random.default_rng([seed, k])
    logprobs = ranked_logprobs(rng, num_positions)
    head = logprobs[:, :k]
    tails = np.empty((num_positions, len(temperatures)))
    for j, temperature in enumerate(temperatures):
        scaled = logprobs / temperature
        tails[:, j] = np.log(np.exp(scaled[:, k:]).sum(axis=1)) - np.log(np.exp(scaled).sum(axis=1))
    cumulated = np.cumsum(np.exp(logprobs), axis=1)
    rank = (cumulated < rng.random((num_positions, 1))).sum(axis=1).clip(0, RANKED_ENTRIES - 1)
    return SparseTargets(
        counts=np.full(num_positions, k, np.int32),
        ids=distinct_ids(rng, num_positions, k).ravel(),
        logprobs=head.astype(np.float32).ravel(),
        label_logprobs=logprobs[np.arange(num_positions), rank].astype(np.float32),
        tail_logmass=tails.astype(np.float32),
        temperatures=temperatures,
    )


def ranked_logprobs(rng: np.random.Generator, num_positions: int) -> NDArray[np.float64]:
    """Return [P, 4000] descending natural logs that sum to 1."""
    exponent = rng.uniform(1.1, 4.0, (num_positions, 1))
    offset = rng.uniform(0.0, 3.0, (num_positions, 1))
    rank = np.arange(1, RANKED_ENTRIES + 1)
    scores = -exponent * np.log(rank + offset) + 0.15 * rng.standard_normal(
        (num_positions, RANKED_ENTRIES), dtype=np.float32
    )
    scores = -np.sort(-scores, axis=1)
    scores -= scores[:, :1]
    logprobs: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return logprobs


def distinct_ids(rng: np.random.Generator, num_positions: int, k: int) -> NDArray[np.int32]:
    """Return [P, K] ids in random order without repetition within a position."""
    weights = np.cumsum(1.0 / (np.arange(VOCAB_SIZE) + 20.0))
    weights /= weights[-1]

    def draw(count: int) -> NDArray[np.int32]:
        ids = np.searchsorted(weights, rng.random(count))
        uniform = rng.random(count) < 0.3
        ids[uniform] = rng.integers(0, VOCAB_SIZE, int(uniform.sum()))
        return ids.clip(0, VOCAB_SIZE - 1).astype(np.int32)

    ids = draw(num_positions * k).reshape(num_positions, k)
    while True:
        order = np.argsort(ids, axis=1, kind="stable")
        ordered = np.take_along_axis(ids, order, axis=1)
        again = np.zeros_like(ids, dtype=np.bool_)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if not again.any():
            return ids
        ids[again] = draw(int(again.sum()))

"""Sparse targets cut from dense distributions in plain float64 loops: the independent truth of the codec's and reader's
tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.payload.targets import Draws, SparseTargets


@dataclass
class Dense:
    """One row's dense distributions with the targets cut from them."""

    logits: np.ndarray
    """[S, V] float64."""
    labels: np.ndarray
    """[S] indices into V."""
    targets: SparseTargets


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logs over the last axis, float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cut(
    rng: np.random.Generator,
    num_positions: int,
    vocab: int,
    counts: np.ndarray,
    temperatures: tuple[float, ...] = (1.0,),
    draws: int = 0,
    names: np.ndarray | None = None,
) -> Dense:
    """Draw random logits over `vocab` entries and cut `counts[s]` head entries per position.

    `names` [vocab] maps entries to token ids, ascending; by default they are equal.
    """
    names = np.arange(vocab) if names is None else names
    logits = rng.normal(0, 3, (num_positions, vocab))
    labels = rng.integers(0, vocab, num_positions)
    tails = np.zeros((num_positions, len(temperatures)))
    ids, logprobs, label_logprobs = [], [], []
    drawn: list[list[np.ndarray]] = [[] for _ in temperatures]
    full = log_softmax(logits)
    for s in range(num_positions):
        order = np.argsort(-full[s], kind="stable")
        head, rest = order[: counts[s]], np.sort(order[counts[s] :])
        ids.append(names[head])
        logprobs.append(full[s, head])
        label_logprobs.append(full[s, labels[s]])
        for j, temperature in enumerate(temperatures):
            at = log_softmax(logits[s] / temperature)
            tails[s, j] = 0.0 if counts[s] == 0 else np.log(np.exp(at[rest]).sum()) if len(rest) else -np.inf
            if draws and len(rest):
                p = np.exp(at[rest])
                drawn[j].append(rng.multinomial(draws, p / p.sum()))
            elif draws:
                drawn[j].append(np.zeros(0, int))
        if draws:
            for j in range(len(temperatures)):
                drawn[j][-1] = np.stack([names[rest][drawn[j][-1] > 0], drawn[j][-1][drawn[j][-1] > 0]])

    def flat(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    made = tuple(
        Draws(
            np.array([pair.shape[1] for pair in drawn[j]], np.int32),
            flat([pair[0] for pair in drawn[j]], np.int32),
            flat([pair[1] for pair in drawn[j]], np.int32),
        )
        for j in range(len(temperatures))
        if draws
    )
    targets = SparseTargets(
        counts.astype(np.int32),
        flat(ids, np.int32),
        flat(logprobs, np.float32),
        np.array(label_logprobs, np.float32),
        tails.astype(np.float32),
        temperatures,
        made,
    )
    return Dense(logits, labels, targets)


def equal_targets(a: SparseTargets, b: SparseTargets) -> bool:
    """Tell whether two targets are equal bit by bit."""
    same = a.temperatures == b.temperatures and len(a.draws) == len(b.draws)
    pairs = [
        (getattr(a, name), getattr(b, name)) for name in ("counts", "ids", "logprobs", "label_logprobs", "tail_logmass")
    ]
    for first, second in zip(a.draws, b.draws, strict=False):
        pairs += [(getattr(first, name), getattr(second, name)) for name in ("counts", "ids", "multiplicities")]
    return same and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)

"""The mean of many drawn targets is the dense distribution: modes `sample` and `top+sample`, each captured temperature.

Both engines draw with `extend_columns` and read its columns with `targets_from_plugin`; the targets here have passed
both, and the codec. What is averaged is the estimate that training uses: the exact head, and tail x multiplicity / m
for each draw.

Confidence: each token's z-score is compared with the two-sided normal quantile at 1e-6 / (number of comparisons), a
Bonferroni bound, so an honest sampler fails less than once in a million runs; stratified draws only make it rarer. A
tilt of 10 % towards one token is found, which the last test shows.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from shared.payload.codec import Codec
from shared.payload.ragged import position_of
from shared.payload.targets import SparseTargets
from shared.payload.targets_at import head_logprobs_at
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.sparse_columns import targets_from_plugin
from teacher_cache.engines.columns.tail_columns import extend_columns

TEMPERATURES = (1.0, 2.0, 4.0)
VOCAB, DRAWS, ROWS = 32, 8, 16_384
CASES = [(k, temperature) for k in (0, 4) for temperature in TEMPERATURES]
LIMIT = -NormalDist().inv_cdf(1e-6 / 2 / (len(CASES) * VOCAB))


def logits() -> np.ndarray:
    return np.random.default_rng(11).normal(0, 1.5, VOCAB)


@pytest.fixture(scope="module", params=[0, 4], ids=["sample", "top+sample"])
def drawn(request) -> SparseTargets:
    """Targets of one distribution at many positions, each with its own key, captured and stored."""
    k = request.param
    scores = torch.from_numpy(np.tile(logits(), (ROWS, 1))).log_softmax(-1)
    layout = ColumnLayout(k, TEMPERATURES, DRAWS, 1.0, VOCAB)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    head_logprobs, head_ids = scores.topk(k, dim=-1)
    keys = torch.from_numpy(np.random.default_rng(5).integers(-(2**62), 2**62, ROWS))
    ids, values = extend_columns(scores, labels, scores[:, 0], head_ids, head_logprobs, keys, layout)
    targets = targets_from_plugin(ids.numpy().astype(np.int32), values.numpy().astype(np.float32), layout)
    codec = Codec(1 / 16, TEMPERATURES, DRAWS, VOCAB, k)
    return codec.decode(codec.encode(targets), ROWS)


def estimates(targets: SparseTargets, j: int) -> np.ndarray:
    """Return [P, V] what training makes of the targets at temperature j."""
    found = np.zeros((targets.num_positions, VOCAB))
    found[position_of(targets.counts), targets.ids] = np.exp(head_logprobs_at(targets, targets.temperatures[j]))
    draws = targets.draws[j]
    rows = position_of(draws.counts)
    found[rows, draws.ids] += np.exp(targets.tail_logmass[rows, j]) * draws.multiplicities / DRAWS
    return found


def z_scores(found: np.ndarray, expected: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Return [V] deviations of the mean in standard deviations of independent draws from `tail` (which sums to its
    mass).
    """
    mass = tail.sum()
    variance = mass**2 * (tail / mass) * (1 - tail / mass) / (DRAWS * ROWS)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, (found.mean(0) - expected) / np.sqrt(variance), 0.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_mean_of_many_draws_is_the_dense_distribution(drawn, temperature):
    """No token of the tail deviates by more than the Bonferroni quantile; the stored head is within
    its quantisation."""
    dense = np.exp(logits() / temperature)
    dense /= dense.sum()
    found = estimates(drawn, TEMPERATURES.index(temperature))
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-6)
    head = drawn.ids[: drawn.counts[0]]
    tail = dense.copy()
    tail[head] = 0.0
    # The stored tail mass is off by up to half a step of 1/1024 in log-odds: compare with the dense tail at that mass.
    stored = np.exp(drawn.tail_logmass[0, TEMPERATURES.index(temperature)].astype(np.float64))
    assert stored == pytest.approx(tail.sum(), rel=1e-3)
    expected = np.where(tail > 0, tail * stored / tail.sum(), dense)
    np.testing.assert_allclose(found[0, head], dense[head], rtol=0.05)
    assert np.abs(z_scores(found, expected, tail * stored / tail.sum())).max() < LIMIT


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pooled_counts_pass_a_chi_square_test(drawn, temperature):
    """Upper quantile at 1e-6 per case, by Wilson and Hilferty's approximation; stratified draws lie below."""
    j = TEMPERATURES.index(temperature)
    tail = np.exp(logits() / temperature)
    tail[drawn.ids[: drawn.counts[0]]] = 0.0
    expected = ROWS * DRAWS * tail / tail.sum()
    counts = np.bincount(drawn.draws[j].ids, drawn.draws[j].multiplicities, VOCAB)
    assert counts[tail == 0].sum() == 0
    inside = tail > 0
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = inside.sum() - 1
    quantile = -NormalDist().inv_cdf(1e-6)
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + quantile * np.sqrt(2 / (9 * freedom))) ** 3


def test_a_tilt_of_a_tenth_towards_one_token_is_found(drawn):
    dense = np.exp(logits() / 2.0)
    tail = dense.copy()
    tail[drawn.ids[: drawn.counts[0]]] = 0.0
    tail *= np.exp(drawn.tail_logmass[0, 1]) / tail.sum()
    tilted = tail.copy()
    tilted[tail.argmax()] *= 1.1
    tilted *= tail.sum() / tilted.sum()
    assert np.abs(z_scores(estimates(drawn, 1), np.where(tail > 0, tilted, 0.0), tail)[tail > 0]).max() > LIMIT

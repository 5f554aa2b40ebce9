"""Columns against dense float64 maths written with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.engines.columns import tail_columns
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.draw_keys import prefix_keys_of, uniforms
from teacher_cache.engines.columns.tail_columns import extend_columns


def columns(
    logits: np.ndarray, layout: ColumnLayout, keys: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Run the code under test on [P, V] float64 logits with label 0."""
    scores = torch.from_numpy(logits).log_softmax(-1)
    labels = torch.zeros(len(scores), dtype=torch.int64)
    head_logprobs, head_ids = scores[:, : layout.vocab_size].topk(layout.num_head, dim=-1)
    keys = torch.arange(len(scores)) if keys is None else keys
    ids, values = extend_columns(scores, labels, scores[:, 0], head_ids, head_logprobs, keys, layout)
    return ids.numpy(), values.numpy()


def dense_row(logits: np.ndarray, layout: ColumnLayout) -> tuple[list[int], dict[float, float]]:
    """Return head ids and tail mass per temperature of one row, from sorted full softmaxes."""
    softmax = {t: np.exp(logits / t - np.logaddexp.reduce(logits / t)) for t in layout.temperatures}
    order = sorted(range(layout.vocab_size), key=lambda v: (-logits[v], v))[: layout.num_head]
    head, covered = [], 0.0
    for v in order:
        if layout.mass < 1.0 and covered >= layout.mass:
            break
        head.append(v)
        covered += softmax[layout.temperatures[-1]][v]
    if layout.has_label and 0 not in head:
        head.append(0)
    return head, {t: 1.0 - softmax[t][head].sum() for t in layout.temperatures}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(0, 12),
    mass=st.sampled_from([1.0, 0.99, 0.7, 0.3]),
    temperatures=st.sampled_from([(1.0,), (1.0, 2.0, 4.0), (0.5, 1.0, 3.0), (1.0, 1.5)]),
    padding=st.integers(0, 5),
    has_label=st.booleans(),
)
def test_head_and_tails_equal_dense_maths(seed, k, mass, temperatures, padding, has_label):
    logits = np.random.default_rng(seed).normal(0, 3, (5, 40))
    layout = ColumnLayout(k, temperatures, 0, mass, 40 - padding, has_label)
    ids, values = columns(logits, layout)
    start = layout.tail_start
    for row in range(5):
        head, tails = dense_row(logits[row], layout)
        kept = ids[row, 1:start] >= 0
        assert ids[row, 1:start][kept].tolist() == head
        np.testing.assert_allclose(values[row, 1:start][kept], (logits[row] - np.logaddexp.reduce(logits[row]))[head])
        assert ids[row, start:].tolist() == list(layout.sentinels)
        for j, t in enumerate(temperatures):
            assert np.exp(values[row, start + j]) == pytest.approx(tails[t], rel=1e-9, abs=1e-12)


def test_a_label_in_the_head_is_drawn_no_more():
    layout = ColumnLayout(2, (1.0,), 64, 1.0, 9, has_label=True)
    logits = np.zeros((1, 9))
    logits[0, [3, 4]] = 5.0
    ids, _ = columns(logits, layout)
    assert ids[0, 1:4].tolist() == [3, 4, 0]
    assert set(ids[0, layout.draw_start :].tolist()) == {1, 2, 5, 6, 7, 8}


def test_tiny_tail_keeps_its_relative_accuracy_in_float32():
    logits = np.full((1, 1000), -30.0)
    logits[0, :4] = [3.0, 2.0, 1.0, 0.0]
    scores = torch.from_numpy(logits).float().log_softmax(-1)
    top = scores.topk(4)
    layout = ColumnLayout(4, (1.0,), 0, 1.0, 1000)
    label = torch.zeros(1, dtype=torch.int64)
    _, values = extend_columns(scores, label, scores[:, 0], top.indices, top.values, label, layout)
    expected = np.logaddexp.reduce(logits[0, 4:]) - np.logaddexp.reduce(logits[0])
    assert values[0, 5].item() == pytest.approx(expected, abs=1e-4)
    assert 1.0 - np.exp(scores[0].numpy().astype(np.float64))[:4].sum() != pytest.approx(np.exp(expected), rel=0.5)


@pytest.mark.parametrize(("vocab", "k", "temperature"), [(151_936, 8, 4.0), (151_936, 1, 2.0), (32_000, 8, 8.0)])
def test_a_tail_near_one_keeps_the_relative_accuracy_of_what_it_leaves_out(vocab, k, temperature):
    """In float32: 1 - tail, which training takes as the head's mass, is right to 1e-5 of itself however small it is."""
    logits = np.random.default_rng(vocab + k).normal(0, 2.0, (24, vocab))
    scores = torch.from_numpy(logits).float().log_softmax(-1)
    top = scores.topk(k)
    layout = ColumnLayout(k, tuple(sorted({1.0, temperature})), 0, 1.0, vocab)
    labels = torch.zeros(24, dtype=torch.int64)
    _, values = extend_columns(scores, labels, scores[:, 0], top.indices, top.values, labels, layout)
    exact = scores.double().numpy() / temperature
    softmax = np.exp(exact - np.logaddexp.reduce(exact, axis=1, keepdims=True))
    head = np.take_along_axis(softmax, top.indices.numpy(), 1).sum(1)
    found = values[:, -1].double().numpy()
    assert (head < 0.02).all()
    np.testing.assert_allclose(-np.expm1(found), head, rtol=1e-5)
    np.testing.assert_allclose(found, np.log1p(-head), rtol=1e-5)


def test_whole_vocabulary_as_head_has_no_tail_and_draws_nothing():
    layout = ColumnLayout(6, (1.0, 2.0), 3, 1.0, 6)
    ids, values = columns(np.random.default_rng(0).normal(size=(4, 6)), layout)
    assert np.isneginf(values[:, 7:9]).all()
    assert (ids[:, 9:] == -1).all()


def test_mode_sample_has_a_tail_of_one():
    layout = ColumnLayout(0, (1.0, 2.0), 4, 1.0, 9)
    ids, values = columns(np.random.default_rng(0).normal(size=(3, 9)), layout)
    assert np.allclose(values[:, 1:3], 0.0)
    assert ((ids[:, 3:] >= 0) & (ids[:, 3:] < 9)).all()


def test_ties_are_ordered_by_id_whatever_order_top_k_returned():
    layout = ColumnLayout(4, (1.0,), 0, 1.0, 8)
    logits = np.array([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0]])
    scores = torch.from_numpy(logits).log_softmax(-1)
    shuffled = torch.tensor([[4, 5, 1, 3]])
    label = torch.zeros(1, dtype=torch.int64)
    ids, _ = extend_columns(scores, label, scores[:, 0], shuffled, scores.gather(1, shuffled), label, layout)
    assert ids[0, 1:5].tolist() == [1, 3, 5, 4]


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits = np.random.default_rng(3).normal(0, 2, (17, 50))
    layout = ColumnLayout(5, (1.0, 2.0), 4, 0.9, 48)
    whole = columns(logits, layout)
    monkeypatch.setattr(tail_columns, "CHUNK_ENTRIES", {"cpu": 120})
    parts = columns(logits, layout)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_outside_the_head(temperature):
    """Each token's pooled count is within 4.5 standard deviations: a false alarm once in 3,000 runs of an honest
    sampler.
    """
    rows, draws, vocab = 20_000, 4, 24
    logits = np.repeat(np.random.default_rng(7).normal(0, 1.5, (1, vocab)), rows, 0)
    layout = ColumnLayout(5, (1.0, 2.0), draws, 1.0, vocab - 2)
    keys = torch.from_numpy(np.random.default_rng(1).integers(-(2**62), 2**62, rows))
    ids, _ = columns(logits, layout, keys)
    start = layout.draw_start + layout.temperatures.index(temperature) * draws
    drawn = ids[:, start : start + draws]
    head = ids[0, 1:6]
    p = np.exp(logits[0] / temperature)
    p[head] = 0.0
    p[vocab - 2 :] = 0.0  # padding is never drawn
    p /= p.sum()
    found = np.bincount(drawn.reshape(-1), minlength=vocab)
    total = rows * draws
    z = (found - total * p)[p > 0] / np.sqrt(total * p * (1 - p))[p > 0]
    assert found[p == 0].sum() == 0
    assert np.abs(z).max() < 4.5


def test_uniforms_are_stratified_and_differ_by_key_temperature_and_draw():
    keys = torch.arange(5000)
    u = uniforms(keys, 1.0, 4)
    assert ((u * 4).floor() == torch.arange(4)).all()
    v = uniforms(keys, 2.0, 4)
    for a, b in ((u[:, 0], u[:, 1]), (u[:, 0], v[:, 0]), (u[:-1, 0], u[1:, 0])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(5000)
    assert abs((u * 4 % 1).mean().item() - 0.5) < 4.5 / np.sqrt(12 * 20_000)


def test_prefix_key_depends_on_the_tokens_so_far_and_their_order_only():
    keys = prefix_keys_of([5, 6, 7, 8])
    assert torch.equal(prefix_keys_of([5, 6, 7, 9])[:3], keys[:3])
    assert prefix_keys_of([5, 6, 7, 9])[3] != keys[3]
    assert prefix_keys_of([6, 5, 7, 8])[1] != keys[1]
    assert len({int(k) for k in prefix_keys_of([0] * 1000)}) == 1000

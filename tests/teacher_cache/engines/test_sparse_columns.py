"""Columns to arrays, against loops over positions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from shared.errors import EngineError
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.columns.sparse_columns import (
    count_draws,
    predicting_rows,
    targets_from_plugin,
    targets_from_stock,
)
from teacher_cache.engines.columns.tail_columns import extend_columns
from teacher_cache.engines.vllm.vllm_batch_test import batch_problem, draws_problem, long_prompts
from teacher_cache.engines.vllm.vllm_self_test import plugin_problem


def full_rows(seed: int = 0, rows: int = 30, vocab: int = 60) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (rows, vocab))).float().log_softmax(-1)


def plugin_rows(scores: torch.Tensor, layout: ColumnLayout) -> tuple[np.ndarray, np.ndarray]:
    labels = torch.arange(len(scores)) % layout.vocab_size
    top = scores[:, : layout.vocab_size].topk(layout.num_head)
    label_logprobs = scores.gather(1, labels[:, None])[:, 0]
    ids, values = extend_columns(scores, labels, label_logprobs, top.indices, top.values, labels * 7919, layout)
    return ids.numpy().astype(np.int32), values.numpy()


def test_rows_follow_the_position_rule():
    spans = np.array([[1, 4], [7, 8], [9, 12]], np.int32)
    expected = [t - 1 for start, end in spans for t in range(start, end)]
    assert predicting_rows(spans).tolist() == expected
    assert predicting_rows(np.empty((0, 2), np.int32)).tolist() == []


def test_plugin_rows_become_ragged_arrays():
    layout = ColumnLayout(8, (1.0, 2.0), 3, 0.5, 55)
    ids, values = plugin_rows(full_rows(), layout)
    targets = targets_from_plugin(ids, values, layout)
    at, drawn_at = 0, [0, 0]
    assert len(set(targets.counts.tolist())) > 1
    for s in range(len(ids)):
        head = [i for i in ids[s, 1:9] if i >= 0]
        assert targets.ids[at : at + targets.counts[s]].tolist() == head
        assert np.array_equal(targets.logprobs[at : at + targets.counts[s]], values[s, 1 : 1 + len(head)])
        at += len(head)
        for j, draws in enumerate(targets.draws):
            count = draws.counts[s]
            found = dict(
                zip(
                    *(a[drawn_at[j] : drawn_at[j] + count].tolist() for a in (draws.ids, draws.multiplicities)),
                    strict=True,
                )
            )
            assert found == Counter(ids[s, 11 + 3 * j : 14 + 3 * j].tolist())
            assert list(found) == sorted(found)
            drawn_at[j] += count
    assert at == len(targets.ids)
    assert np.array_equal(targets.label_logprobs, values[:, 0])
    assert np.array_equal(targets.tail_logmass, values[:, 9:11])
    assert targets.temperatures == (1.0, 2.0)


def test_rows_without_sentinels_are_refused():
    layout = ColumnLayout(8, (1.0, 2.0), 0, 1.0, 60)
    ids, values = plugin_rows(full_rows(), layout)
    ids[17, layout.tail_start] = 3
    with pytest.raises(EngineError, match="one capture per engine"):
        targets_from_plugin(ids, values, layout)


def test_sequence_without_supervised_positions_gives_empty_arrays():
    layout = ColumnLayout(4, (1.0, 2.0), 3, 1.0, 60)
    targets = targets_from_plugin(np.empty((0, 13), np.int32), np.empty((0, 13), np.float32), layout)
    assert targets.num_positions == 0
    assert targets.tail_logmass.shape == (0, 2)
    assert len(targets.draws) == 2


@pytest.mark.parametrize("has_label", [False, True])
@pytest.mark.parametrize("mass", [1.0, 0.9])
def test_stock_rows_give_what_the_plugin_gives_at_temperature_one(mass, has_label):
    layout = ColumnLayout(12, (1.0,), 0, mass, 57, has_label)
    scores = full_rows(5)
    ids, values = plugin_rows(scores, layout)
    expected = targets_from_plugin(ids, values, layout)
    top = scores.topk(12)
    stock_ids = torch.cat([torch.from_numpy(ids[:, :1]), top.indices], 1).numpy().astype(np.int32)
    stock_values = torch.cat([torch.from_numpy(values[:, :1]), top.values], 1).numpy()
    found = targets_from_stock(stock_ids, stock_values, layout)
    inside = (top.indices < 57).all(-1).numpy()  # a padded entry takes a place among stock rows only
    assert inside.any()
    assert np.array_equal(found.counts[inside], expected.counts[inside])
    same = np.repeat(inside, found.counts), np.repeat(inside, expected.counts)
    assert np.array_equal(found.ids[same[0]], expected.ids[same[1]])
    assert np.allclose(found.tail_logmass[inside], expected.tail_logmass[inside], atol=1e-4)
    assert (found.ids < 57).all()


def test_stock_rows_with_ties_are_put_in_order_of_ids():
    layout = ColumnLayout(3, (1.0,), 0, 1.0, 9)
    ids = np.array([[0, 7, 4, 5], [0, 1, 2, 3]], np.int32)
    values = np.log(np.array([[0.1, 0.3, 0.3, 0.2], [0.1, 0.5, 0.3, 0.1]], np.float32))
    assert targets_from_stock(ids, values, layout).ids.tolist() == [4, 7, 5, 1, 2, 3]


def test_draws_of_an_empty_tail_are_not_counted():
    draws = count_draws(np.array([[-1, -1], [4, 4], [5, 2]], np.int32))
    assert draws.counts.tolist() == [0, 1, 2]
    assert draws.ids.tolist() == [4, 2, 5]
    assert draws.multiplicities.tolist() == [2, 1, 1]


class TestSelfTest:
    """What the start-up probe must notice."""

    layout = ColumnLayout(6, (1.0, 2.0), 2, 1.0, 60)

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = full_rows(9)
        return *plugin_rows(scores, self.layout), scores.double().numpy()

    def test_honest_rows_pass(self):
        assert plugin_problem(*self.rows(), self.layout) is None

    @pytest.mark.parametrize("column", [7, 8])
    def test_wrong_tail_is_noticed(self, column):
        ids, values, dense = self.rows()
        values[3, column] += 0.05
        assert "tails at temperature" in plugin_problem(ids, values, dense, self.layout)

    def test_plain_top_k_rows_are_noticed(self):
        ids, values, dense = self.rows()
        ids[:, 7:9] = 5
        assert "sentinels" in plugin_problem(ids, values, dense, self.layout)

    def test_draws_from_the_head_are_noticed(self):
        ids, values, dense = self.rows()
        ids[2, -1] = ids[2, 1]
        assert "head" in plugin_problem(ids, values, dense, self.layout)

    def test_swapped_head_entry_is_noticed(self):
        ids, values, dense = self.rows()
        ids[0, 1], ids[0, 2] = ids[0, 2], ids[0, 1]
        assert "head differs" in plugin_problem(ids, values, dense, self.layout)

    def test_left_out_token_is_noticed(self):
        ids, values, dense = self.rows()
        dense[4, next(v for v in range(60) if v not in ids[4, 1:7])] = 0.0
        assert "leaves out" in plugin_problem(ids, values, dense, self.layout)


class TestBatchTest:
    """What the start-up batch must notice: rows of a prompt that is scored among others and over several passes."""

    layout = ColumnLayout(6, (1.0, 2.0), 8, 0.95, 60)

    def batch(self, num_rows: int = 200):
        """Return (the plug-in's columns, stock columns, the prompt, full rows)."""
        scores = full_rows(9, num_rows)
        found = plugin_rows(scores, self.layout)
        top = scores.topk(6)
        stock_ids = torch.cat([torch.from_numpy(found[0][:, :1]), top.indices], 1).numpy().astype(np.int32)
        stock_values = torch.cat([torch.from_numpy(found[1][:, :1]), top.values], 1).numpy()
        return found, (stock_ids, stock_values), [0, *found[0][:, 0].tolist()], scores.double().numpy()

    def test_honest_rows_pass(self):
        found, stock, prompt, dense = self.batch()
        assert batch_problem(found, stock, prompt, self.layout, "float32") is None
        assert draws_problem(found[0], dense, self.layout) is None

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda ids, values: (np.roll(ids, 1, 0), np.roll(values, 1, 0)),
            lambda ids, values: (ids, np.concatenate([values[:100], np.roll(values[100:], 1, 0)])),
            lambda ids, values: (ids[:-1], values[:-1]),
            lambda ids, values: (ids, values + 0.3),
        ],
        ids=["all shifted", "second half shifted", "one missing", "off"],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows_that_are_not_the_prompts_are_noticed(self, spoil, dtype):
        found, stock, prompt, _ = self.batch()
        assert batch_problem(spoil(*found), stock, prompt, self.layout, dtype) is not None

    def test_a_row_of_plain_top_k_is_noticed(self):
        (ids, values), stock, prompt, _ = self.batch()
        ids[150, self.layout.tail_start] = 5
        assert "sentinels" in batch_problem((ids, values), stock, prompt, self.layout, "float32")

    def test_head_and_tail_that_do_not_belong_together_are_noticed(self):
        (ids, values), stock, prompt, _ = self.batch()
        values[:, self.layout.tail_start] = np.roll(values[:, self.layout.tail_start], 1)
        assert "sum to" in batch_problem((ids, values), stock, prompt, self.layout, "float32")

    @pytest.mark.parametrize("column", [0, 8])
    def test_draws_that_do_not_follow_the_tail_are_noticed(self, column):
        (ids, _), _, _, dense = self.batch()
        tail = np.where(np.isin(np.arange(dense.shape[1]), ids[:, 1:7]), np.inf, dense)
        least = np.argsort(tail[:, :60], axis=1)[:, :8]
        ids[:, self.layout.draw_start + column : self.layout.draw_start + column + 8] = least
        assert "do not follow the tail" in draws_problem(ids, dense, self.layout)

    def test_draws_that_are_missing_are_noticed(self):
        (ids, _), _, _, dense = self.batch()
        ids[3, -1] = -1
        assert "did not draw 8 tokens" in draws_problem(ids, dense, self.layout)

    def test_prompts_are_longer_than_a_pass_and_more_than_1024_rows_on_the_gpus_runner_alone(self):
        for longest, batch_tokens in ((40_000, 8192), (2047, 512), (200, 2048)):
            prompts = long_prompts("v2", longest, batch_tokens, 500)
            assert sum(map(len, prompts)) > max(1024, batch_tokens)
            assert max(map(len, prompts)) <= longest
        assert [len(prompt) for prompt in long_prompts("v1", 40_000, 8192, 500)] == [256]
        assert [len(prompt) for prompt in long_prompts("v1", 64, 8192, 500)] == [64]

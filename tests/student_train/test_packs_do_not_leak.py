"""Rows of a pack see nothing of each other, and a pack's arrays say what each row alone says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from shared.errors import TrainingError
from shared.payload.targets_at import head_logprobs_at
from shared.recipe.recipe import StageTrainer
from student_train.batch.collate import collate
from student_train.batch.dataset import CacheList, PackDataset, build_pack
from student_train.batch.row_targets import at_temperatures, first_positions, within_vocabulary
from student_train.order.order import StageRows
from student_train.order.stage_plan import plan_stage
from student_train.student.row_separation import separate_rows
from student_train.student.student_head import body_of, run_body


def load(path, attention="sdpa"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()


@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("llama", "sdpa"), ("qwen3", "eager")])
@torch.no_grad()
def test_hidden_states_in_a_pack_are_those_of_each_row_alone(tiny, family, attention):
    model = load(getattr(tiny, family), attention)
    rows = list(CacheList.open([tiny.cache], None))[:5]
    batch = collate([build_pack(rows[:3], 256, None, 512), build_pack(rows[3:], 256, None, 512)])
    packed = run_body(body_of(model), batch["input_ids"], batch["position_ids"])[0]
    alone = [
        body_of(model)(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None], use_cache=False)[0][0]
        for row in rows
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    expected = torch.cat(
        [hidden[torch.from_numpy(row.predictor_index()).long()] for hidden, row in zip(alone, rows, strict=True)]
    )
    torch.testing.assert_close(packed[batch["predictor_index"]], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_model_whose_packed_rows_see_each_other_runs_each_length_alone(tiny):
    model = load(tiny.qwen3, "eager")
    body = body_of(model)
    original = body.forward
    body.forward = lambda position_ids=None, **kwargs: original(
        position_ids=torch.arange(kwargs["input_ids"].shape[1])[None], **kwargs
    )
    assert separate_rows(model, 512) == "alone"
    rows = [torch.arange(start, start + length) for start, length in ((5, 20), (50, 3), (90, 21))]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    packed = run_body(body, torch.cat(rows)[None], positions[None])[0]
    alone = torch.cat([original(input_ids=row[None], use_cache=False)[0][0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_check_refuses_a_model_whose_tokens_see_what_follows(tiny):
    model = load(tiny.qwen3, "eager")
    for layer in body_of(model).layers:
        layer.self_attn.forward = functools.partial(_without_mask, layer.self_attn.forward)
    with pytest.raises(TrainingError, match="see what comes after"):
        separate_rows(model, 512)


def _without_mask(forward, *args, attention_mask=None, **kwargs):
    return forward(*args, attention_mask=None, **kwargs)


def test_batch_of_several_packs_equals_one_pack_of_all_rows(tiny):
    rows = list(CacheList.open([tiny.drawn], None))
    several = collate([build_pack(rows[:4], 256, (1.0, 2.0), 512), build_pack(rows[4:9], 256, (1.0, 2.0), 512)])
    one = collate([build_pack(rows[:9], 256, (1.0, 2.0), 512)])
    assert several.keys() == one.keys()
    assert {"draw_counts", "draw_ids", "draw_multiplicities", "shift_labels"} <= several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=0, atol=0, msg=name)


def test_cut_row_loses_its_end_and_the_targets_of_what_is_lost(tiny):
    rows = list(CacheList.open([tiny.drawn], None))
    limit = int(rows[0].spans[0, 0]) + 3
    pack = build_pack(rows[:2], limit, (2.0, 1.0), 512)
    kept = [min(limit, len(row.token_ids)) - int(row.spans[0, 0]) for row in rows[:2]]
    assert kept[0] == 3
    np.testing.assert_array_equal(
        pack["labels"], np.concatenate([row.labels()[:n] for row, n in zip(rows, kept, strict=False)])
    )
    cut, whole = first_positions(rows[0].targets, 3), rows[0].targets
    for temperature in (1.0, 2.0):
        np.testing.assert_allclose(
            head_logprobs_at(cut, temperature), head_logprobs_at(whole, temperature)[: 3 * 4], rtol=1e-6
        )
    for j in (0, 1):
        drawn = [np.repeat(np.arange(len(t.draws[j].counts)), t.draws[j].counts) for t in (cut, whole)]
        np.testing.assert_array_equal(drawn[0], drawn[1][drawn[1] < 3])
        np.testing.assert_array_equal(cut.draws[j].ids, whole.draws[j].ids[drawn[1] < 3])
    assert build_pack(rows[:1], int(rows[0].spans[0, 0]), None, 512)["labels"].size == 0


def test_labels_follow_their_predictor_within_one_row(tiny):
    caches = CacheList.open([tiny.cache, tiny.drawn], None, with_targets=False)
    plan = plan_stage(StageTrainer(pack_tokens=128), StageRows(0, caches.num_tokens, caches.sources, 128), None)
    for pack in (PackDataset(caches, plan, None)[i] for i in range(plan.num_packs)):
        np.testing.assert_array_equal(pack["input_ids"][pack["predictor_index"] + 1], pack["labels"])
        assert (pack["position_ids"][pack["predictor_index"] + 1] > 0).all()


def test_padding_in_the_teachers_top_k_moves_into_the_tail(tiny):
    """Against the full distribution: what is left of the head keeps its mass, and each row still sums to 1 at each
    temperature."""
    row = CacheList.open([tiny.cache], None)[0]
    vocab_size = int(np.median(row.targets.ids))
    inside = within_vocabulary(row.targets, vocab_size)
    assert 0 < len(inside.ids) < len(row.targets.ids)
    assert inside.ids.max() < vocab_size
    kept = row.targets.ids < vocab_size
    np.testing.assert_array_equal(inside.ids, row.targets.ids[kept])
    for j, temperature in enumerate((1.0, 2.0)):
        logprobs = head_logprobs_at(inside, temperature)
        np.testing.assert_allclose(logprobs, head_logprobs_at(row.targets, temperature)[kept], atol=1e-4)
        position = np.repeat(np.arange(inside.num_positions), inside.counts)
        head = np.bincount(position, np.exp(logprobs.astype(np.float64)), inside.num_positions)
        np.testing.assert_allclose(head + np.exp(inside.tail_logmass[:, j]), 1.0, atol=1e-5)


def test_unneeded_temperatures_are_left_out_with_their_draws(tiny):
    targets = CacheList.open([tiny.drawn], None)[0].targets
    only = at_temperatures(targets, (1.0,))
    assert only.temperatures == (1.0,)
    assert only.tail_logmass.shape == (targets.num_positions, 1)
    np.testing.assert_array_equal(only.draws[0].ids, targets.draws[0].ids)

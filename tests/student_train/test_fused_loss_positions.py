"""Scores of positions against dense float64, and targets as tensors against targets as rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.errors import TrainingError
from shared.payload.targets import Draws, SparseTargets
from student_train.batch.target_batch import TargetBatch, pack_targets
from student_train.losses import LossTerm
from student_train.operator.position_scores import evaluate_positions
from tests.student_train.dense_loss import SHAPES, divergence_of_masses, make_case, masses


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_dense_ones_position_by_position(shape):
    case = make_case(shape)
    scores = evaluate_positions(case.hidden, case.weight, case.labels, case.targets, chunk_positions=4)
    logits = case.hidden @ case.weight.t()
    term = LossTerm("forward_kl" if shape == "sample" else "bucket")  # hybrid targets are scored by head and bucket
    expected = [divergence_of_masses("forward_kl", *masses(case, logits, s, term), {}) for s in range(9)]
    torch.testing.assert_close(scores.kl_nats, torch.stack(expected).float())
    torch.testing.assert_close(
        scores.label_nll_nats, torch.nn.functional.cross_entropy(logits, case.labels, reduction="none").float()
    )
    if shape == "sample":
        drawn = case.multiplicities[0]
        firsts = drawn.argmax(1).tolist()
        # 5 draws at most, so the five most drawn are all of them.
        fives = [row.nonzero()[:, 0].tolist() for row in drawn]
    else:
        firsts = [ids[0] if ids else -1 for ids in case.supports]
        fives = [ids[:5] for ids in case.supports]
    probabilities, best = logits.softmax(1).max(1)
    assert scores.top1_equal.tolist() == [first == token for first, token in zip(firsts, best.tolist(), strict=True)]
    assert scores.top1_in_teacher_top5.tolist() == [
        token in five for five, token in zip(fives, best.tolist(), strict=True)
    ]
    assert scores.top1_is_label.tolist() == (best == case.labels).tolist()
    both = torch.minimum(case.teacher_logits.softmax(1), logits.softmax(1))
    least = torch.stack([both[s, ids].sum() for s, ids in enumerate(case.supports)])
    torch.testing.assert_close(scores.acceptance, least.float())
    assert bool((both.sum(1) <= scores.acceptance_at_most + 1e-6).all())
    torch.testing.assert_close(scores.top1_logprob.exp(), probabilities.float())


def test_top1_is_equal_where_the_student_is_the_teacher():
    case = make_case("self")
    scores = evaluate_positions(case.hidden.float(), case.weight.float(), case.labels, case.targets)
    assert bool(scores.top1_equal.all())
    assert float(scores.kl_nats.abs().max()) < 1e-6


def row(counts, temperatures=(1.0, 2.0), draws=True) -> SparseTargets:
    counts = np.asarray(counts, np.int32)
    num_positions, total = len(counts), int(counts.sum())
    made = [Draws(np.full(num_positions, 2, np.int32), np.tile([50 + j, 60 + j], num_positions).astype(np.int32),
                  np.tile([1, 3], num_positions).astype(np.int32)) for j in range(len(temperatures))]  # fmt: skip
    return SparseTargets(
        counts=counts,
        ids=np.concatenate([np.arange(n) for n in counts]).astype(np.int32),
        logprobs=-np.arange(1, total + 1, dtype=np.float32),
        label_logprobs=np.zeros(num_positions, np.float32),
        tail_logmass=-np.arange(1, num_positions * len(temperatures) + 1, dtype=np.float32).reshape(num_positions, -1),
        temperatures=temperatures,
        draws=tuple(made) if draws else (),
    )


def test_rows_keep_their_members_when_packed():
    rows = [row([2, 0]), row([3])]
    batch = TargetBatch.from_rows(rows)
    members = batch.members(slice(1, 3), 1.0, 100, torch.float64, with_draws=True)
    assert members.ids.tolist() == [[100, 100, 100, 50, 60], [0, 1, 2, 50, 60]]
    tails = [float(rows[0].tail_logmass[1, 0]), float(rows[1].tail_logmass[0, 0])]
    for s, tail in enumerate(tails):
        assert members.log_p[s, 3:5].exp().tolist() == pytest.approx([np.exp(tail) / 4, 3 * np.exp(tail) / 4])
        assert float(members.log_p[s, 5]) == -torch.inf
    assert members.log_p[0, :3].tolist() == [-torch.inf] * 3
    assert members.log_p[1, :3].tolist() == [-1, -2, -3]
    hotter = batch.members(slice(1, 3), 2.0, 100, torch.float64, with_draws=True)
    assert hotter.ids[:, 3:].tolist() == [[51, 61], [51, 61]]
    bucket = batch.members(slice(1, 3), 2.0, 100, torch.float64, with_draws=False)
    assert bucket.log_p[:, -1].tolist() == [-4, -2]
    assert float(bucket.log_p[1].exp().sum()) == pytest.approx(1.0)


def test_position_without_draws_keeps_its_tail_in_the_bucket():
    targets = row([2, 2], temperatures=(1.0,))
    lone = Draws(np.array([2, 0], np.int32), targets.draws[0].ids[:2], targets.draws[0].multiplicities[:2])
    partly = SparseTargets(
        targets.counts, targets.ids, targets.logprobs, targets.label_logprobs, targets.tail_logmass, (1.0,), (lone,)
    )
    members = TargetBatch.from_rows([partly]).members(slice(0, 2), 1.0, 100, torch.float64, with_draws=True)
    assert members.log_p[:, -1].tolist() == [-torch.inf, -2.0]
    assert members.ids[1].tolist() == [0, 1, 100, 100]


def test_rows_captured_differently_do_not_share_a_pack():
    with pytest.raises(TrainingError, match="captured alike"):
        pack_targets([row([2]), row([2], temperatures=(1.0,))])
    with pytest.raises(TrainingError, match="captured alike"):
        pack_targets([row([2]), row([2], draws=False)])

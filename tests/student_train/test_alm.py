"""Likelihood matching against the definition in plain autograd, over chunks of several tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.errors import TrainingError
from shared.payload.targets import SparseTargets
from student_train.batch.row_targets import first_positions
from student_train.batch.target_batch import TargetBatch
from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from tests.student_train.dense_loss import Case, make_case

STARTS = [True, False, False, True, True, False, True, True, False]
TOLD = [-2.5, 0.0, 0.0, -0.3, -4.0, 0.0, -torch.inf, -1.0, 0.0]
CHUNKS = [([0, 1, 2], -2.5), ([3], -0.3), ([4, 5], -4.0), ([7, 8], -1.0)]


def case_with_chunks() -> tuple[Case, TargetBatch]:
    case = make_case("fixed")
    counts = torch.tensor([4 if start else 0 for start in STARTS], dtype=torch.int32)
    kept = torch.tensor(STARTS).repeat_interleave(4)
    batch = {
        **case.batch,
        "support_counts": counts,
        "support_ids": case.batch["support_ids"][kept],
        "support_logprobs": case.batch["support_logprobs"][kept],
        "tail_logmass": case.batch["tail_logmass"].masked_fill(counts[:, None] == 0, 0.0),
        "label_logprobs": torch.tensor(TOLD),
    }
    return case, TargetBatch.from_batch(batch)


def definition(label_logprobs: torch.Tensor, tau: float) -> torch.Tensor:
    total = label_logprobs.new_zeros(())
    for positions, told in CHUNKS:
        p = torch.tensor(told).double().exp() ** (1 / tau)
        q = label_logprobs[positions].sum().exp() ** (1 / tau)
        total = total + tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return total


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_value_and_gradients_are_those_of_the_definition(tau: float, softcap: float | None) -> None:
    case, targets = case_with_chunks()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = logits.log_softmax(1).gather(1, case.labels[:, None])[:, 0]
    expected = (0.7 * definition(logprobs, tau) - 0.3 * logprobs.sum()) / 11.0
    by_hidden, by_weight = torch.autograd.grad(expected, [hidden, weight])
    terms = [LossTerm("alm", 0.7, options={"tau": tau}), LossTerm("cross_entropy", 0.3)]
    options = {"softcap": softcap, "chunk_positions": 4}
    fused = fused_sparse_loss(hidden, weight, case.labels, targets, terms, 11.0, **options)
    fused.loss.backward()
    torch.testing.assert_close(fused.loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(hidden.grad, by_hidden, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(weight.grad, by_weight, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(fused.values["alm"], (definition(logprobs, tau) / 11.0).detach())
    assert list(fused.values) == ["alm", "cross_entropy"]


def test_a_student_that_finds_chunks_as_likely_has_no_gradient() -> None:
    case, targets = case_with_chunks()
    logprobs = (case.hidden @ case.weight.t()).log_softmax(1).gather(1, case.labels[:, None])[:, 0]
    told = torch.zeros(9, dtype=torch.float64)
    for positions, _ in CHUNKS:
        told[positions[0]] = logprobs[positions].sum()
    told[6] = -torch.inf
    hidden = case.hidden.clone().requires_grad_()
    same = replace(targets, label_logprobs=told)
    fused = fused_sparse_loss(hidden, case.weight, case.labels, same, [LossTerm("alm")], 9.0)
    fused.loss.backward()
    assert abs(float(fused.loss.detach())) < 1e-10
    assert float(hidden.grad.abs().max()) < 1e-8


def test_positions_without_a_head_add_nothing_to_divergences() -> None:
    case, targets = case_with_chunks()
    for name in ("forward_kl", "reverse_kl", "jsd"):
        hidden = case.hidden.clone().requires_grad_()
        fused_sparse_loss(hidden, case.weight, case.labels, targets, [LossTerm(name)], 9.0).loss.backward()
        silent = ~torch.tensor(STARTS)
        assert float(hidden.grad[silent].abs().max()) < 1e-12
        assert float(hidden.grad[~silent].abs().min()) > 0


def test_a_chunk_that_a_row_loses_its_end_of_is_left_out() -> None:
    targets = SparseTargets(
        np.array([1, 0, 1, 0], np.int32),
        np.array([5, 6], np.int32),
        np.log(np.array([0.5, 0.5], np.float32)),
        np.array([-1.0, 0.0, -2.0, 0.0], np.float32),
        np.array([[np.log(0.5)], [0.0], [np.log(0.5)], [0.0]], np.float32),
    )
    assert first_positions(targets, 3).label_logprobs.tolist() == [-1.0, 0.0, -np.inf]
    assert first_positions(targets, 2).label_logprobs.tolist() == [-1.0, 0.0]


def row_whose_first_position_has_no_head(labels: list[float]) -> SparseTargets:
    return SparseTargets(
        np.array([0, 1, 0], np.int32),
        np.array([5], np.int32),
        np.log(np.array([0.5], np.float32)),
        np.array(labels, np.float32),
        np.array([[0.0], [np.log(0.5)], [0.0]], np.float32),
    )


@pytest.mark.parametrize("first", [-1.5, -np.inf])
def test_rows_of_a_pack_have_chunks_of_their_own(first: float) -> None:
    """A row may begin where nothing of the teacher's head could be placed among the student's tokens."""
    rows = [row_whose_first_position_has_no_head([first, label, 0.0]) for label in (-0.7, -3.0)]
    case = make_case("fixed")
    together, alone = (
        [
            fused_sparse_loss(
                case.hidden[where],
                case.weight,
                case.labels[where],
                TargetBatch.from_rows(chosen),
                [LossTerm("alm")],
                1.0,
            ).loss
            for where, chosen in parts
        ]
        for parts in ([(slice(0, 6), rows)], [(slice(0, 3), rows[:1]), (slice(3, 6), rows[1:])])
    )
    torch.testing.assert_close(together[0], alone[0] + alone[1])


def test_likelihoods_need_targets() -> None:
    case, _ = case_with_chunks()
    with pytest.raises(TrainingError, match="needs the teacher's targets"):
        fused_sparse_loss(case.hidden, case.weight, case.labels, None, [LossTerm("alm")], 9.0)

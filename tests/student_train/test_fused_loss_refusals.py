"""What the fused operator refuses, in a sentence, before any work."""

from __future__ import annotations

import pytest
import torch

from shared.errors import TrainingError
from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from tests.student_train.dense_loss import make_case


def attempt(term: LossTerm, shape: str = "fixed", num_positions: float = 9, with_targets: bool = True, **options):
    case = make_case(shape)
    targets = case.targets if with_targets else None
    return fused_sparse_loss(case.hidden, case.weight, case.labels, targets, [term], num_positions, **options)


@pytest.mark.parametrize("shape", ["fixed", "hybrid", "sample"])
def test_temperature_that_was_not_captured_is_refused(shape):
    with pytest.raises(TrainingError, match=r"temperature 4 was not captured \(captured: 1, 2\)"):
        attempt(LossTerm("forward_kl", 1.0, 4.0), shape)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "decoupled_kl"])
def test_divergence_biased_by_draws_is_refused_without_head(name):
    with pytest.raises(TrainingError, match="mode 'sample', where it is biased"):
        attempt(LossTerm(name), "sample")
    attempt(LossTerm(name), "hybrid")


def test_what_the_capture_does_not_tell_is_refused():
    with pytest.raises(TrainingError, match="mode 'top', which does not tell the shape of the tail; use forward_kl"):
        attempt(LossTerm("tail_weighted_kl"), "fixed")
    with pytest.raises(TrainingError, match="mode 'sample', which does not tell the teacher's entropy"):
        attempt(LossTerm("forward_kl", by_entropy=True), "sample")
    for name in ("tail_weighted_kl", "forward_kl"):
        attempt(LossTerm(name), "sample")


def test_terms_that_mean_nothing_are_refused():
    with pytest.raises(TrainingError, match="'forwardkl' is unknown; use one of cross_entropy"):
        attempt(LossTerm("forwardkl"))
    with pytest.raises(TrainingError, match="option 'skew', which it does not have; it takes beta"):
        attempt(LossTerm("jsd", options={"skew": 0.1}))
    with pytest.raises(TrainingError, match="needs the teacher's targets"):
        attempt(LossTerm("forward_kl"), with_targets=False)
    for name in ("cross_entropy", "alm"):
        with pytest.raises(TrainingError, match=f"{name} was asked for at temperature 2; it is taken at 1"):
            attempt(LossTerm(name, 1.0, 2.0))
        with pytest.raises(TrainingError, match=f"{name} was to be weighted by the teacher's entropy"):
            attempt(LossTerm(name, by_entropy=True))
    case = make_case("fixed")
    for name in ("forward_kl", "alm"):
        with pytest.raises(TrainingError, match=f"'{name}' does not say from which of several teachers"):
            fused_sparse_loss(case.hidden, case.weight, case.labels, {"math": case.targets}, [LossTerm(name)], 9)
    with pytest.raises(TrainingError, match="name at least one"):
        fused_sparse_loss(case.hidden, case.weight, case.labels, case.targets, [], 9)


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(TrainingError, match="0 supervised positions"):
        attempt(LossTerm("forward_kl"), num_positions=0)
    with pytest.raises(TrainingError, match="soft cap of 0"):
        attempt(LossTerm("forward_kl"), softcap=0.0)
    with pytest.raises(TrainingError, match="chunk_positions is 0"):
        attempt(LossTerm("forward_kl"), chunk_positions=0)


def test_ids_outside_the_head_are_refused():
    with pytest.raises(TrainingError, match="tokens 0 to 9; use a cache made with the student's tokenizer"):
        attempt(LossTerm("forward_kl"), vocab_size=10)
    with pytest.raises(TrainingError, match="head has 23 rows and the tokenizer 24 tokens"):
        attempt(LossTerm("forward_kl"), vocab_size=24)
    case = make_case("fixed")
    with pytest.raises(TrainingError, match="token id -100"):
        fused_sparse_loss(
            case.hidden, case.weight, torch.full_like(case.labels, -100), None, [LossTerm("cross_entropy")], 9
        )

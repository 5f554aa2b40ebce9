"""Several teachers in one loss: the fused operator against dense float64 mixtures and sums, and routed positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from student_train.batch.target_batch import TargetBatch
from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from tests.student_train.dense_loss import Case, dense_loss, make_case, relative_error

OPTIONS = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"skew": 0.2}, "skew_reverse_kl": {"skew": 0.2}}
MANY = [0, 2, 3, 7, 8]
FEW = [1, 2]


def second_teacher(case: Case, shape: str = "fixed") -> Case:
    """Another teacher's targets over the same hidden states and labels."""
    other = make_case(shape, seed=11, positions=len(case.labels), vocab=case.weight.shape[0])
    return replace(other, hidden=case.hidden, weight=case.weight, labels=case.labels)


def at_positions(case: Case, positions: list[int]) -> Case:
    """The case of some positions alone, their place in the batch said in its targets."""
    counts = case.batch["support_counts"].tolist()
    entries = torch.tensor([s in positions for s, count in enumerate(counts) for _ in range(count)])
    chosen = torch.tensor(positions)
    batch = {
        "support_counts": case.batch["support_counts"][chosen],
        "support_ids": case.batch["support_ids"][entries],
        "support_logprobs": case.batch["support_logprobs"][entries],
        "tail_logmass": case.batch["tail_logmass"][chosen],
        "temperatures": case.batch["temperatures"],
        "positions": chosen,
    }
    supports = [case.supports[s] for s in positions]
    return Case(
        case.hidden[chosen], case.weight, case.labels[chosen], case.teacher_logits[chosen], supports, None, batch
    )


def run_fused(case: Case, targets, terms, **options):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    options = {"chunk_positions": 4, **options}
    fused = fused_sparse_loss(hidden, weight, case.labels, targets, terms, 11.0, **options)
    return fused, *torch.autograd.grad(fused.loss, [hidden, weight])


def of(layer: str, name: str, weight: float, temperature: float = 1.0) -> LossTerm:
    return LossTerm(name, weight, temperature, OPTIONS.get(name, {}), layer)


def test_two_weighted_teachers_have_the_mixture_gradient_of_forward_kl():
    math, vocab = make_case("whole"), 23
    code = second_teacher(math, "whole")
    terms = [of("math", "forward_kl", 0.3), of("code", "forward_kl", 0.7)]
    fused, by_hidden, by_weight = run_fused(math, {"math": math.targets, "code": code.targets}, terms)
    mixture = 0.3 * math.teacher_logits.softmax(1) + 0.7 * code.teacher_logits.softmax(1)
    inputs = [math.hidden.clone().requires_grad_(), math.weight.clone().requires_grad_()]
    log_q = (inputs[0] @ inputs[1].t()).log_softmax(1)
    dense = (mixture * (mixture.log() - log_q)).sum() / 11.0
    assert mixture.shape[1] == vocab
    for found, expected in zip((by_hidden, by_weight), torch.autograd.grad(dense, inputs), strict=True):
        assert relative_error(found, expected) < 1e-9
    apart = float(fused.loss.detach() - dense.detach())  # what the teachers differ by, which no student changes
    entropy = [-(p * p.log()).sum() for p in (math.teacher_logits.softmax(1), code.teacher_logits.softmax(1), mixture)]
    assert apart == pytest.approx(float(entropy[2] - 0.3 * entropy[0] - 0.7 * entropy[1]) / 11.0, rel=1e-9)


def three_teachers() -> tuple[Case, dict[str, Case]]:
    """One of all positions, one of many, one of few."""
    base = make_case("fixed")
    many, few = at_positions(second_teacher(base, "ragged"), MANY), at_positions(base, FEW)
    return base, {"all": base, "many": many, "few": few}


def assert_equal_to_dense_sum(name: str, temperature: float, chosen: tuple[str, ...], **options) -> None:
    base, cases = three_teachers()
    weights = {"all": 0.1, "many": 1.1, "few": 2.1}
    own = [LossTerm("cross_entropy", 0.2), *(of(layer, name, weights[layer], temperature) for layer in chosen)]
    targets = {layer: cases[layer].targets for layer in chosen}
    fused, by_hidden, by_weight = run_fused(base, targets, own, **options)
    inputs = [base.hidden.clone().requires_grad_(), base.weight.clone().requires_grad_()]
    logits = inputs[0] @ inputs[1].t()
    expected = dense_loss(base, logits, own[:1], 11.0)
    for term in own[1:]:
        where = cases[term.layer].batch.get("positions", torch.arange(9))
        expected = expected + dense_loss(cases[term.layer], logits[where], [term], 11.0)
    assert relative_error(fused.loss.detach(), expected.detach()) < 1e-9
    for found, wanted in zip((by_hidden, by_weight), torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(found, wanted) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_routed_and_mixed_teachers_equal_the_sum_of_dense_divergences(name, temperature):
    for chosen in (("all", "many", "few"), ("many", "few"), ("few",)):
        assert_equal_to_dense_sum(name, temperature, chosen)


def test_tiles_of_the_vocabulary_give_the_same_sum(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("student_train.operator.tiled_loss.MIN_TILE", 16)
    assert_equal_to_dense_sum("jsd", 2.0, ("all", "few"), operator="triton", chunk_bytes=1)


@pytest.mark.parametrize("beside", [[LossTerm("cross_entropy", 0.3)], [of("all", "jsd", 0.5, 2.0)]])
def test_a_routed_teacher_leaves_other_rows_bit_for_bit(beside):
    base = make_case("fixed", positions=12, width=8, vocab=41)
    few = at_positions(second_teacher(base), FEW)
    targets = {"all": base.targets, "few": few.targets}
    options = {"chunk_positions": 5}
    _, without, _ = run_fused(base, targets, beside, **options)
    _, routed, _ = run_fused(base, targets, [*beside, of("few", "reverse_kl", 0.7)], **options)
    others = [s for s in range(12) if s not in FEW]
    assert torch.equal(routed[others], without[others])
    assert not torch.equal(routed[FEW], without[FEW])


def test_a_teacher_without_positions_in_a_batch_counts_for_nothing():
    base = make_case("fixed")
    terms = [of("few", "forward_kl", 0.7), LossTerm("cross_entropy", 0.3)]
    fused, by_hidden, _ = run_fused(base, {}, terms)
    alone, expected, _ = run_fused(base, None, terms[1:])
    assert torch.equal(by_hidden, expected)
    assert float(fused.values["forward_kl@few"]) == 0.0
    assert torch.equal(fused.values["cross_entropy"], alone.values["cross_entropy"])
    nothing, by_hidden, by_weight = run_fused(base, {}, terms[:1])
    assert float(nothing.loss.detach()) == float(by_hidden.abs().max()) == float(by_weight.abs().max()) == 0.0


def test_positions_outside_the_batch_are_refused():
    base = make_case("fixed")
    targets = TargetBatch.from_batch({**at_positions(base, FEW).batch, "positions": torch.tensor([1, 9])})
    with pytest.raises(ValueError, match="one entry per position"):
        run_fused(base, {"few": targets}, [of("few", "forward_kl", 1.0)])


def test_drawn_tails_of_one_teacher_beside_the_head_of_another():
    base = make_case("hybrid")
    other = second_teacher(base, "fixed")
    terms = [of("drawn", "forward_kl", 0.6), of("head", "forward_kl", 0.4)]
    _, by_hidden, by_weight = run_fused(base, {"drawn": base.targets, "head": other.targets}, terms)
    inputs = [base.hidden.clone().requires_grad_(), base.weight.clone().requires_grad_()]
    logits = inputs[0] @ inputs[1].t()
    dense = dense_loss(base, logits, terms[:1], 11.0) + dense_loss(other, logits, terms[1:], 11.0)
    for found, expected in zip((by_hidden, by_weight), torch.autograd.grad(dense, inputs), strict=True):
        assert relative_error(found, expected) < 1e-9

"""The fused operator against dense float64 autograd, finite differences and its own invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.recipe.sections.losses import NEEDS_DRAWS
from student_train.batch.target_batch import TargetBatch
from student_train.losses import ZERO_LOG_MASS, LossTerm, divergences, registry
from student_train.operator import head_chunks
from student_train.operator.fused_loss import fused_sparse_loss
from student_train.operator.loss_terms import term_keys
from tests.student_train.dense_loss import SHAPES, Case, dense_loss, make_case, outside, relative_error

DIVERGENCES = [name for name in divergences if name != "cross_entropy"]
REFUSED = {"forward_kl": (), "tail_weighted_kl": ("fixed", "ragged", "whole")}
"""Targets that a divergence does not take; draws alone for most."""
OPTIONS = {
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "tail_weighted_kl": {"tail_weight": 1.7},
    "decoupled_kl": {"head_temperature": 3.0},
}
TERMS = {
    1.0: lambda name: [LossTerm(name, 0.7, 1.0, OPTIONS.get(name, {})), LossTerm("cross_entropy", 0.3)],
    2.0: lambda name: [LossTerm("cross_entropy", 0.3), LossTerm(name, 0.7, 2.0, OPTIONS.get(name, {}))],
}


def test_every_divergence_with_options_is_tried_off_its_defaults():
    assert {name for name, divergence in divergences.items() if divergence.options} == set(OPTIONS)


def run_fused(case: Case, terms, num_positions=11.0, dtype=torch.float64, **options):
    hidden = case.hidden.to(dtype, copy=True).requires_grad_()
    weight = case.weight.to(dtype, copy=True).requires_grad_()
    fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, num_positions, **options)
    fused.loss.backward()
    return fused, hidden.grad, weight.grad


def run_dense(case: Case, terms, num_positions=11.0):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = dense_loss(case, hidden @ weight.t(), terms, num_positions)
    return loss, *torch.autograd.grad(loss, [hidden, weight])


def assert_equal_to_dense(case: Case, terms, bound: float, **options):
    fused, by_hidden, by_weight = run_fused(case, terms, **options)
    loss, hidden_expected, weight_expected = run_dense(case, terms)
    assert relative_error(fused.loss.detach(), loss.detach()) <= bound
    assert relative_error(by_hidden, hidden_expected) <= bound
    assert relative_error(by_weight, weight_expected) <= bound


def combinations():
    for name in DIVERGENCES:
        for shape in SHAPES:
            if shape not in REFUSED.get(name, ("sample",)):
                yield from ((name, shape, t) for t in TERMS if name != "decoupled_kl" or t == 1.0)


@pytest.mark.parametrize(("name", "shape", "temperature"), combinations())
def test_value_and_gradients_equal_dense_autograd(name, shape, temperature):
    case = make_case(shape)
    terms = TERMS[temperature](name)
    assert_equal_to_dense(case, terms, 1e-9, chunk_positions=4)
    assert_equal_to_dense(case, terms, 1e-4, chunk_positions=4, dtype=torch.float32)


@pytest.mark.parametrize("by_entropy", [False, True])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if "ragged" not in REFUSED.get(name, ())])
def test_chunk_of_positions_without_a_head_equals_dense_autograd(name, by_entropy):
    case = make_case("ragged", seed=3)
    assert case.supports[0] == []
    assert_equal_to_dense(case, [replace(TERMS[1.0](name)[0], by_entropy=by_entropy)], 1e-9, chunk_positions=1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(
            (name, shape)
            for name in ("forward_kl", "reverse_kl", "decoupled_kl")
            for shape in ("ragged", "whole", "hybrid")
        ),
        ("tail_weighted_kl", "hybrid"),
    ],
)
def test_weights_by_the_teachers_entropy_equal_dense_autograd(name, shape):
    terms = [replace(term, by_entropy=term.name == name) for term in TERMS[1.0](name)]
    assert_equal_to_dense(make_case(shape, seed=5), terms, 1e-9, chunk_positions=4)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in NEEDS_DRAWS])
def test_mass_of_just_what_stands_for_an_empty_one_is_not_empty(name):
    """A sure teacher's second token may lie 100 nats below, as 25 do at a temperature of 1/4 on the grid of codes."""
    teacher = torch.full((9, 23), 3 * ZERO_LOG_MASS, dtype=torch.float64)
    teacher[:, 5], teacher[:, 2:5] = 0.0, ZERO_LOG_MASS
    case = make_case("fixed", teacher=teacher)
    assert (case.batch["support_logprobs"] == ZERO_LOG_MASS).sum() == 27
    assert_equal_to_dense(case, [LossTerm(name, 0.7, 1.0, OPTIONS.get(name, {}))], 1e-6)


@pytest.mark.parametrize("name", ["tail_weighted_kl", "decoupled_kl"])
def test_riders_at_their_neutral_setting_are_forward_kl(name):
    """On draws for a tail's weight; over head and bucket for the head's temperature."""
    case = make_case("hybrid" if name == "tail_weighted_kl" else "ragged", seed=4)
    plain, *expected = run_fused(case, [LossTerm("forward_kl")])
    neutral, *found = run_fused(case, [LossTerm(name, options={registry[name].options[0]: 1.0})])
    torch.testing.assert_close(neutral.loss, plain.loss)
    torch.testing.assert_close(found, expected)


def test_cross_entropy_alone_needs_no_targets():
    case = make_case("fixed")
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    fused = fused_sparse_loss(hidden, weight, case.labels, None, [LossTerm("cross_entropy", 2.0)], 9)
    expected = 2.0 * torch.nn.functional.cross_entropy(hidden @ weight.t(), case.labels)
    found = torch.autograd.grad(fused.loss, [hidden, weight])
    for gradient, wanted in zip(found, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(fused.values["cross_entropy"], expected.detach() / 2.0)


@pytest.mark.parametrize("shape", ["ragged", "hybrid"])
def test_many_terms_at_many_temperatures_add_up(shape):
    terms = [
        LossTerm("forward_kl", 0.5),
        LossTerm("forward_kl", 0.25, 2.0),
        LossTerm("reverse_kl", 0.125),
        LossTerm("jsd", 0.5, 2.0),
        LossTerm("cross_entropy", 0.3),
    ]
    case = make_case(shape, seed=3)
    assert_equal_to_dense(case, terms, 1e-9, chunk_positions=2)
    fused, _, _ = run_fused(case, terms)
    assert (
        list(fused.values) == term_keys(terms) == ["forward_kl", "forward_kl_2", "reverse_kl", "jsd", "cross_entropy"]
    )
    total = sum(term.weight * value for term, value in zip(terms, fused.values.values(), strict=True))
    torch.testing.assert_close(total, fused.loss.detach())


def test_bias_scale_and_softcap_have_right_gradients():
    case = make_case("ragged")
    bias = torch.linspace(-1, 1, case.weight.shape[0], dtype=torch.float64)
    terms = TERMS[2.0]("forward_kl")
    for scale, softcap in ((1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)):
        inputs = [tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, bias)]
        fused = fused_sparse_loss(
            *inputs[:2],
            case.labels,
            case.targets,
            terms,
            9,
            head_bias=inputs[2],
            logit_scale=scale,
            softcap=softcap,
            chunk_positions=4,
        )
        found = torch.autograd.grad(fused.loss, inputs)
        logits = (inputs[0] @ inputs[1].t() + inputs[2]) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected_loss = dense_loss(case, logits, terms, 9)
        assert relative_error(fused.loss.detach(), expected_loss.detach()) < 1e-9
        for gradient, expected in zip(found, torch.autograd.grad(expected_loss, inputs), strict=True):
            assert relative_error(gradient, expected) < 1e-9


def test_gradient_equals_finite_difference():
    case = make_case("hybrid")
    terms = TERMS[2.0]("forward_kl")
    _, by_hidden, by_weight = run_fused(case, terms)
    generator = torch.Generator().manual_seed(1)
    for name, gradient in (("hidden", by_hidden), ("weight", by_weight)):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            moved = make_case("hybrid")
            setattr(moved, name, getattr(case, name) + step * direction)
            losses.append(float(run_fused(moved, terms)[0].loss.detach()))
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def test_half_batches_with_the_global_denominator_equal_the_whole():
    case = make_case("fixed", positions=10)
    terms = TERMS[2.0]("jsd")
    whole, by_hidden, by_weight = run_fused(case, terms, 10)
    loss, hidden_parts, weight_total = 0.0, [], torch.zeros_like(by_weight)
    for where in (slice(0, 5), slice(5, 10)):
        batch = {
            "support_counts": case.batch["support_counts"][where],
            "support_ids": case.batch["support_ids"].view(10, 4)[where].reshape(-1),
            "support_logprobs": case.batch["support_logprobs"].view(10, 4)[where].reshape(-1),
            "tail_logmass": case.batch["tail_logmass"][where],
            "temperatures": case.batch["temperatures"],
        }
        half = Case(case.hidden[where], case.weight, case.labels[where], case.teacher_logits[where], [], None, batch)
        fused, hidden_part, weight_part = run_fused(half, terms, torch.tensor(10))
        loss += float(fused.loss.detach())
        hidden_parts.append(hidden_part)
        weight_total += weight_part
    assert loss == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    torch.testing.assert_close(torch.cat(hidden_parts), by_hidden, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(weight_total, by_weight, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "tail_weighted_kl"])  # takes drawn targets
def test_teacher_equal_to_student_gives_zero_loss_and_gradient(name, temperature):
    case = make_case("self")
    terms = [LossTerm(name, 1.0, temperature)]
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        fused, by_hidden, by_weight = run_fused(case, terms, dtype=dtype)
        assert abs(float(fused.loss.detach())) < bound
        assert float(by_hidden.abs().max()) < bound
        assert float(by_weight.abs().max()) < bound


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl"])
def test_tiny_student_tail_keeps_its_gradient_in_float32(name):
    case = make_case("fixed", positions=4, vocab=40)
    case.hidden[:, 0] = 1.0
    case.weight[:, 0] = 0.0
    support = torch.tensor(case.supports[0])
    case.weight[support, 0] = 18.0
    batch = case.batch
    batch["support_ids"] = support.repeat(4)
    case.supports = [support.tolist()] * 4
    logprobs = case.teacher_logits.log_softmax(1)
    batch["support_logprobs"] = logprobs[:, support].reshape(-1)
    batch["tail_logmass"] = (1 - logprobs[:, support].exp().sum(1)).log()[:, None].repeat(1, 2)
    q = (case.hidden @ case.weight.t()).softmax(1)
    assert 1e-9 < float(1 - q[:, support].sum(1).max()) < 1e-6
    terms = [LossTerm(name)]
    _, by_hidden, by_weight = run_fused(case, terms, dtype=torch.float32)
    _, hidden_expected, weight_expected = run_dense(case, terms)
    tail = outside(case.supports[:1], 40)[0]
    assert relative_error(by_hidden[:, 1:], hidden_expected[:, 1:]) < 2e-5
    assert relative_error(by_weight[~tail], weight_expected[~tail]) < 2e-5
    assert relative_error(by_weight[tail], weight_expected[tail]) < 2e-5  # where 1 - sum of members loses half


def test_gradient_of_draws_is_right_on_average():
    num_draws = 5_000
    teacher = 1.5 * torch.randn(1, 23, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    case = make_case("hybrid", positions=num_draws, teacher=teacher.expand(num_draws, -1))
    hidden = case.hidden[:1].expand(num_draws, -1).clone().requires_grad_()
    fused_sparse_loss(hidden, case.weight, case.labels, case.targets, [LossTerm("forward_kl")], 1).loss.backward()
    one = case.hidden[:1].clone().requires_grad_()
    full = torch.nn.functional.kl_div(
        (one @ case.weight.t()).log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="sum"
    )
    full.backward()
    deviation = (hidden.grad.mean(0) - one.grad[0]) / (hidden.grad.std(0) / num_draws**0.5)
    assert float(deviation.abs().max()) < 4.0
    assert float(hidden.grad.std(0).max()) > 0.01


def test_chunk_length_changes_nothing():
    case = make_case("ragged")
    terms = TERMS[2.0]("forward_kl")
    reference = run_fused(case, terms, chunk_positions=100)
    for length in (1, 2, 5):
        fused, *gradients = run_fused(case, terms, chunk_positions=length)
        torch.testing.assert_close(fused.loss, reference[0].loss, rtol=1e-12, atol=0)
        for gradient, expected in zip(gradients, reference[1:], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


def test_runs_are_bitwise_equal():
    case = make_case("ragged", positions=40, width=32, vocab=501)
    terms = TERMS[2.0]("skew_reverse_kl")
    first, second = (run_fused(case, terms, dtype=torch.float32, chunk_positions=7) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_head_rows_beyond_the_vocabulary_take_no_part():
    case = make_case("ragged")
    terms = TERMS[1.0]("forward_kl")
    _, by_hidden, by_weight = run_fused(case, terms)
    vocab = case.weight.shape[0]
    case.weight = torch.cat([case.weight, torch.full((5, case.weight.shape[1]), 3.0, dtype=torch.float64)])
    _, hidden_sliced, weight_sliced = run_fused(case, terms, vocab_size=vocab)
    torch.testing.assert_close(hidden_sliced, by_hidden)
    torch.testing.assert_close(weight_sliced[:vocab], by_weight)
    assert torch.equal(weight_sliced[vocab:], torch.zeros(5, 6, dtype=torch.float64))


def test_frozen_head_gets_no_gradient_and_changes_none():
    case = make_case("fixed")
    terms = TERMS[1.0]("forward_kl")
    _, expected, _ = run_fused(case, terms)
    hidden = case.hidden.clone().requires_grad_()
    fused_sparse_loss(hidden, case.weight, case.labels, case.targets, terms, 11.0).loss.backward()
    assert torch.equal(hidden.grad, expected)
    assert case.weight.grad is None


def test_without_grad_only_values_come_out():
    case = make_case("hybrid")
    terms = TERMS[2.0]("forward_kl")
    expected, _, _ = run_fused(case, terms)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.no_grad():
        fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, 11.0)
    assert not fused.loss.requires_grad
    assert not any(value.requires_grad for value in expected.values.values())
    torch.testing.assert_close(fused.loss, expected.loss.detach())


def test_incoming_gradient_scales_and_backward_runs_once():
    case = make_case("fixed")
    terms = TERMS[1.0]("forward_kl")
    _, expected, _ = run_fused(case, terms)
    hidden = case.hidden.clone().requires_grad_()
    loss = fused_sparse_loss(hidden, case.weight, case.labels, case.targets, terms, 11.0).loss
    (3.0 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, 3.0 * expected)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_hidden_states_get_float32_logits(weight_dtype):
    case = make_case("fixed", positions=64, width=32, vocab=301)
    hidden = case.hidden.to(torch.bfloat16).requires_grad_()
    weight = case.weight.to(torch.bfloat16).to(weight_dtype).requires_grad_()
    terms = TERMS[1.0]("forward_kl")
    with torch.autocast("cpu", torch.bfloat16):
        fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, 11.0)
    fused.loss.backward()
    assert fused.loss.dtype == torch.float32
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, weight_dtype)
    case.hidden, case.weight = hidden.detach().double(), weight.detach().double()
    loss, hidden_expected, weight_expected = run_dense(case, terms)
    assert relative_error(fused.loss.detach(), loss.detach()) < 1e-6
    assert relative_error(hidden.grad, hidden_expected) < 5e-3
    assert relative_error(weight.grad, weight_expected) < (5e-3 if weight_dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spare_rows", [0, 3, 40])
def test_products_with_wide_output_are_even_and_give_the_same_gradients(monkeypatch, spare_rows, weight_dtype):
    real_mm = torch.mm
    seen = []

    def mm(a, b, out_dtype=None, *, out=None):  # what a GPU offers: bfloat16 in, float32 out
        if out_dtype is None:
            assert torch.bfloat16 not in (a.dtype, b.dtype)
            return real_mm(a, b, out=out)
        assert {a.dtype, b.dtype} == {torch.bfloat16}
        seen.extend((a, b) if out is None else (a, b, out))
        result = real_mm(a.float(), b.float())
        return result if out is None else out.copy_(result)

    case = make_case("ragged", positions=64, width=32, vocab=301)
    case.hidden, case.weight = case.hidden.bfloat16().double(), case.weight.bfloat16().double()
    terms = TERMS[2.0]("forward_kl")
    loss, hidden_expected, weight_expected = run_dense(case, terms)
    monkeypatch.setattr(head_chunks, "_has_wide_products", lambda device_type: True)
    monkeypatch.setattr(torch, "mm", mm)
    spare = torch.full((spare_rows, 32), 1e3)
    hidden = case.hidden.bfloat16().requires_grad_()
    weight = torch.cat([case.weight, spare]).to(weight_dtype).requires_grad_()
    options = {"chunk_positions": 16, "vocab_size": 301}
    fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, 11.0, **options)
    fused.loss.backward()
    assert relative_error(fused.loss.detach(), loss.detach()) < 1e-5
    assert relative_error(hidden.grad, hidden_expected) < 1e-2
    assert relative_error(weight.grad[:301], weight_expected) < 1e-2
    assert not weight.grad[301:].any(), "rows beyond the vocabulary never move"
    assert len(seen) == 4 * (3 + 3 + 2)
    assert {size % 16 for tensor in seen for size in (*tensor.shape, max(tensor.stride()))} == {0}


@pytest.mark.parametrize("spare_rows", [0, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_pad_a_head_change_nothing_beyond_rounding(spare_rows, dtype):
    case = make_case("hybrid", positions=20, width=16, vocab=301)
    hidden = case.hidden.to(dtype, copy=True).requires_grad_()
    weight = torch.cat([case.weight, torch.full((spare_rows, 16), 1e3)]).to(dtype).requires_grad_()
    terms = TERMS[1.0]("reverse_kl")
    fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, 11.0, vocab_size=301)
    fused.loss.backward()
    found, bound = run_fused(case, terms, dtype=dtype), 4 * torch.finfo(dtype).eps
    assert relative_error(fused.loss.detach(), found[0].loss.detach()) <= bound
    assert relative_error(hidden.grad, found[1]) <= 4 * bound
    assert relative_error(weight.grad[:301], found[2]) <= 4 * bound
    assert not weight.grad[301:].any()


@pytest.mark.parametrize("shape", ["fixed", "sample"])
def test_no_positions_give_a_loss_of_zero(shape):
    case = make_case(shape)
    empty = {name: tensor[..., :0] for name, tensor in case.batch.items()}
    empty |= {"tail_logmass": case.batch["tail_logmass"][:0], "temperatures": case.batch["temperatures"]}
    targets = TargetBatch.from_batch(empty)
    hidden, weight = case.hidden[:0].clone().requires_grad_(), case.weight.clone().requires_grad_()
    fused = fused_sparse_loss(hidden, weight, case.labels[:0], targets, TERMS[2.0]("forward_kl"), 4)
    fused.loss.backward()
    assert float(fused.loss.detach()) == 0.0
    assert torch.equal(weight.grad, torch.zeros_like(weight))

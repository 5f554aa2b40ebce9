"""Balancing by gradient norms and by uncertainty, against autograd and dense gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from student_train.operator.gradient_norms import head_squares
from student_train.train.balance import GradNorm, Uncertainty
from tests.student_train.dense_loss import dense_loss, make_case

POSITIVE = st.floats(1e-2, 1e2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE, POSITIVE), min_size=2, max_size=4), st.floats(0, 2))
def test_step_of_grad_norm_is_its_papers_gradient_step(numbers, alpha):
    names = [f"loss{i}" for i in range(len(numbers))]
    first, now, norms = (dict(zip(names, column, strict=True)) for column in zip(*numbers, strict=True))
    balancer = GradNorm(names, alpha, learning_rate=1e-3)
    balancer.observe(first, dict.fromkeys(names, 1.0))
    before = torch.tensor([balancer.factors[name] for name in names], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([norms[name] for name in names], dtype=torch.float64)
    ratio = torch.tensor([now[name] / first[name] for name in names], dtype=torch.float64)
    strength = before * g
    target = (strength.mean() * (ratio / ratio.mean()) ** alpha).detach()
    (strength - target).abs().sum().backward()
    reach = ((strength - target).abs() / g).detach()
    expected = (
        before.detach() - torch.minimum(1e-3 * before.grad.abs() / strength.detach().mean(), reach) * before.grad.sign()
    )
    expected = expected.clamp_min(1e-4) * (len(names) / expected.clamp_min(1e-4).sum())
    balancer.observe(now, norms)
    near_kink = (strength - target).abs() < 1e-9 * strength.mean()
    for i, name in enumerate(names):
        if not bool(near_kink.any()):
            assert balancer.factors[name] == pytest.approx(float(expected[i]), rel=1e-9)


def test_fixed_norms_are_made_equally_strong_and_their_sum_is_kept():
    balancer = GradNorm(["a", "b", "c"], alpha=0.0, learning_rate=0.01)
    norms = {"a": 4.0, "b": 1.0, "c": 0.5}
    for _ in range(2000):
        balancer.observe(dict.fromkeys(norms, 1.0), norms)
    strengths = [balancer.factors[name] * norms[name] for name in norms]
    assert max(strengths) / min(strengths) < 1.001
    assert math.fsum(balancer.factors.values()) == pytest.approx(3)


def test_slower_loss_is_pulled_more_with_alpha():
    balancers = [GradNorm(["fast", "slow"], alpha=alpha, learning_rate=0.01) for alpha in (0.0, 1.5)]
    for balancer in balancers:
        balancer.observe({"fast": 1.0, "slow": 1.0}, {"fast": 1.0, "slow": 1.0})
        for _ in range(200):
            balancer.observe({"fast": 0.2, "slow": 0.9}, {"fast": 1.0, "slow": 1.0})
    assert balancers[1].factors["slow"] > 1.3 > 1.1 > balancers[0].factors["slow"]


def test_loss_without_a_gradient_keeps_its_factor_and_starts_when_it_has_one():
    balancer, pair = (GradNorm(names, alpha=1.5, learning_rate=0.05) for names in (["a", "b", "none"], ["a", "b"]))
    for _ in range(3):
        balancer.observe({"a": 1.0, "b": 1.0, "none": 0.0}, {"a": 3.0, "b": 1.0, "none": 0.0})
        pair.observe({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0})
    assert balancer.factors == pytest.approx({**pair.factors, "none": 1.0})
    assert balancer.factors["a"] < 0.95
    balancer.observe({"a": 1.0, "b": 1.0, "none": 2.0}, {"a": 1.0, "b": 1.0, "none": 1.0})
    assert balancer.state()["first_values"]["none"] == 2.0
    assert all(0.5 < factor < 1.5 for factor in balancer.factors.values())
    before = balancer.factors
    balancer.observe(dict.fromkeys(before, 0.0), dict.fromkeys(before, 0.0))
    assert balancer.factors == before


def test_log_variances_descend_the_papers_loss_to_its_minimum():
    balancer = Uncertainty(["a", "b"], learning_rate=0.1)
    values = {"a": 3.0, "b": 0.2}
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        loss = (torch.exp(-s) * torch.tensor([3.0, 0.2], dtype=torch.float64) + s).sum()
        (slope,) = torch.autograd.grad(loss, s)
        with torch.no_grad():
            s -= 0.1 * slope.clamp(-1, 1)
        balancer.observe(values, None)
        assert [-math.log(factor) for factor in balancer.factors.values()] == pytest.approx(
            s.tolist(), rel=1e-9, abs=1e-12
        )
    assert balancer.factors == pytest.approx({"a": 1 / 3.0, "b": 1 / 0.2}, rel=1e-3)


def test_state_comes_back_to_the_last_bit():
    import json

    for balancer, fresh in (
        (GradNorm(["a", "b"], 1.5, 0.1), GradNorm(["a", "b"], 1.5, 0.1)),
        (Uncertainty(["a", "b"], 0.1), Uncertainty(["a", "b"], 0.1)),
    ):
        for i in range(5):
            balancer.observe({"a": 1.0 / (i + 3), "b": 2.0}, {"a": 0.3, "b": 1.7 / (i + 1)})
        fresh.restore(json.loads(json.dumps(balancer.state())))
        assert fresh.factors == balancer.factors
        assert fresh.observe({"a": 0.1, "b": 0.2}, {"a": 1.0, "b": 0.1}) == balancer.observe(
            {"a": 0.1, "b": 0.2}, {"a": 1.0, "b": 0.1}
        )
        assert fresh.factors == balancer.factors


def test_gradient_norms_equal_dense_ones_and_add_up_over_passes():
    case = make_case("ragged")
    terms = [LossTerm("forward_kl", 0.3, 2.0), LossTerm("cross_entropy", 9.0), LossTerm("reverse_kl", 0.0)]

    def loss_of(hidden, some):
        return fused_sparse_loss(hidden, case.weight, case.labels, case.targets, some, 11.0)

    found = head_squares(case.hidden, terms, loss_of)
    for key, term in zip(("forward_kl", "cross_entropy", "reverse_kl"), terms, strict=True):
        hidden = case.hidden.clone().requires_grad_()
        alone = LossTerm(term.name, 1.0, term.temperature)
        (gradient,) = torch.autograd.grad(dense_loss(case, hidden @ case.weight.t(), [alone], 11.0), hidden)
        assert float(found[key]) == pytest.approx(float(gradient.square().sum()), rel=1e-6)

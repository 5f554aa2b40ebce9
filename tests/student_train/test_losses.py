"""Each divergence against its definition on probabilities, and what every one of them must obey."""

from __future__ import annotations

import inspect

import pytest
import torch

from shared.recipe.sections.losses import LOSSES, NEEDS_DRAWS, TAKES_DRAWS_ALONE, names_of
from student_train.losses import ZERO_LOG_MASS, divergences, registry
from tests.student_train.dense_loss import divergence_of_masses

DIVERGENCES = [name for name in divergences if name != "cross_entropy"]


def masses(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).softmax(1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_is_the_definition_on_probabilities(name):
    p, q = masses(0), masses(1)
    for options in ({}, *({option: 0.35} for option in registry[name].options)):
        expected = torch.stack([divergence_of_masses(name, p[i], q[i], options) for i in range(6)])
        torch.testing.assert_close(registry[name].function(p.log(), q.log(), **options), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_positive_and_zero_only_at_equality(name):
    p, q = masses(0), masses(1)
    assert bool((registry[name].function(p.log(), q.log()) > 1e-3).all())
    assert float(registry[name].function(p.log(), p.log()).abs().max()) < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_mass_that_both_sides_lack_counts_for_nothing(name):
    p, q = masses(0).log(), masses(1).log()
    empty = torch.full((6, 2), ZERO_LOG_MASS, dtype=torch.float64)
    q_wide = torch.cat([empty, q], 1).requires_grad_()
    values = registry[name].function(torch.cat([empty, p], 1), q_wide)
    torch.testing.assert_close(values, registry[name].function(p, q))
    (slopes,) = torch.autograd.grad(values.sum(), q_wide)
    assert float(slopes[:, :2].abs().max()) < 1e-40


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_counts_for_nothing_beside_masses_that_are_smaller_than_it(name):
    """A student sure of another token gives all of the teacher's head, or all of its tail, less than exp(-100)."""
    splits = name in NEEDS_DRAWS
    p, q = masses(0).log(), masses(1).log()
    q[:, 3:] -= 200 if splits else 0
    q[:, :4] -= 0 if splits else 200
    q = q.log_softmax(1)
    empty = torch.full((6, 2), ZERO_LOG_MASS, dtype=torch.float64)
    p_wide, q_wide = (torch.cat([x[:, :4], empty, x[:, 4:]], 1) for x in (p, q))
    q_wide.requires_grad_()
    options = {"num_head": 3} if splits else {}
    found = registry[name].function(p_wide, q_wide, **options)
    expected = torch.stack(
        [divergence_of_masses(name, a.exp(), b.exp(), {}, 3 if splits else None) for a, b in zip(p, q, strict=True)]
    )
    torch.testing.assert_close(found, expected)
    (slopes,) = torch.autograd.grad(found.sum(), q_wide)
    assert float(slopes[:, 4:6].abs().max()) < 1e-40


def test_skewed_divergences_are_bounded_where_plain_ones_are_not():
    p, q = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    p, q = (x.masked_fill(x == -torch.inf, ZERO_LOG_MASS) for x in (p, q))
    bound = -torch.tensor(0.1).log()
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        torch.testing.assert_close(registry[name].function(p, q)[0], bound)
    assert float(registry["forward_kl"].function(p, q)) > 99
    assert float(registry["jsd"].function(p, q)) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_draws_alone_do_for_divergences_that_are_linear_in_the_teacher(name):
    def slopes(p):
        log_q = masses(1).log().requires_grad_()
        (found,) = torch.autograd.grad(registry[name].function(p.log(), log_q).sum(), log_q)
        return found

    p, other = masses(0), masses(2)
    difference = slopes(0.3 * p + 0.7 * other) - (0.3 * slopes(p) + 0.7 * slopes(other))
    assert (float(difference.abs().max()) < 1e-12) == (name in TAKES_DRAWS_ALONE)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_draws_are_needed_by_what_tells_the_tail_from_the_head(name):
    assert ("num_head" in inspect.signature(registry[name].function).parameters) == (name in NEEDS_DRAWS)


def test_registry_has_every_loss_that_a_recipe_may_name():
    assert set(registry) == {name for kind in LOSSES for name in names_of(kind)}

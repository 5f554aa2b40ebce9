"""Evaluation-driven sampling: a source's share follows its held-out KL, so that what evaluates worse is drawn more.

With m the shares that the recipe begins with and KL_s the held-out KL of source s, what is asked for is a_s = m_s KL_s
/ sum(m KL); the shares drawn are `smoothing` x the shares before + (1 - smoothing) x a, moved into [floor, ceiling] at
the least change of their proportions. A pure function of the shares before and the evaluation; the checkpoint stores
the shares so far.
Cost: nothing beside the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import TrainingError
from shared.recipe.recipe import Sampling
from student_train.order.scheduled_plan import GrowingPlan

Shares = dict[str, float]
"""Share of the tokens by source."""


def within_bounds(shares: Mapping[str, float], floor: float, ceiling: float) -> Shares:
    """Return shares that sum to 1, each within floor and ceiling, and in the given proportions wherever neither binds.

    They are clip(c x share, floor, ceiling) with the one c that makes them sum to 1, found by bisection (200 halvings
    reach the last bit).
    """
    largest = max(shares.values())
    given = {name: share / largest for name, share in shares.items()} if largest > 0 else dict.fromkeys(shares, 1.0)
    given = {name: max(share, 1e-12) for name, share in given.items()}
    low, high = 0.0, 1e13
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(min(max(middle * share, floor), ceiling) for share in given.values()) < 1:
            low = middle
        else:
            high = middle
    return {name: min(max(high * share, floor), ceiling) for name, share in given.items()}


def next_shares(
    before: Mapping[str, float], base: Mapping[str, float], kl_nats: Mapping[str, float], rule: Sampling
) -> Shares:
    """Return the shares that follow from an evaluation.

    Args:
        before: shares until now.
        base: shares that the recipe begins with.
        kl_nats: held-out KL by source.
        rule: the recipe's section.
    """
    strength = {name: share * max(kl_nats[name], 0.0) for name, share in base.items()}
    total = math.fsum(strength.values())
    if not math.isfinite(total) or total <= 0:  # nothing to follow: a student that diverged, or one that is its teacher
        return dict(before)
    asked = {name: value / total for name, value in strength.items()}
    mixed = {name: rule.smoothing * before[name] + (1 - rule.smoothing) * asked[name] for name in base}
    return within_bounds(mixed, rule.floor, rule.ceiling)


class EvaluationSampling:
    """Plans a stage's rounds as its evaluations come."""

    def __init__(self, rule: Sampling, plan: GrowingPlan, base: Mapping[str, float], codes: Mapping[str, int]) -> None:
        """Prepare to plan rounds of `plan`, beginning with the shares `base` by source; `codes` are the sources'
        numbers.
        """
        self._rule, self._plan, self._codes = rule, plan, codes
        self._base = within_bounds(base, rule.floor, rule.ceiling)
        self.history: list[Shares] = []
        """Shares of every round so far."""

    def restore(self, history: Sequence[Mapping[str, float]]) -> None:
        """Plan again the rounds of a checkpoint.

        Raises:
            TrainingError: it was made with other sources.
        """
        for shares in history:
            if set(shares) != set(self._base):
                raise TrainingError(
                    f"the checkpoint holds shares of {', '.join(sorted(shares))} where the stage draws from "
                    f"{', '.join(sorted(self._base))}; remove the stage's directory to train it again"
                )
            self._add(dict(shares))

    def follow(self, step: int, figures: Mapping[str, Any]) -> Shares | None:
        """Plan the next round from the evaluation after `step` steps; None where none is due."""
        if step != len(self.history) * self._plan.every_steps or self._plan.is_complete:
            return None
        kl_nats = {name: part["kl_nats"] for name, part in figures["by_source"].items()}
        self._add(next_shares(self.history[-1] if self.history else self._base, self._base, kl_nats, self._rule))
        return self.history[-1]

    def _add(self, shares: Shares) -> None:
        self._plan.add_round({self._codes[name]: share for name, share in shares.items()})
        self.history.append(shares)

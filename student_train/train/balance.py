"""Balance between a stage's losses, by gradient norms or by uncertainty, from named values and norms, wherever they
come from.

`grad_norm` (GradNorm, Chen et al. 2018, ICML, 1711.02257): g_i is the norm of the gradient of loss i, b_i its factor (1
at first), G_i = b_i g_i, and r_i its value over its first one, relative to the mean of those ratios. The factors
descend sum |G_i - mean(G) r_i^alpha|, the target held constant, by one step of `learning_rate` / mean(G) that ends at
the target where it would pass it, and are scaled to sum to their number again. alpha = 0 makes all gradients equally
strong; a larger one pulls more on losses that fall slowly. A loss without a gradient in a step (g_i = 0, as
`contrastive` where no pass has two rows) is left out of
that measurement: its factor stays, and its first value is that of the first step that has a gradient.
`uncertainty` (Kendall, Gal and Cipolla 2018, CVPR, 1705.07115): the loss is sum exp(-s_i) L_i + s_i with learned
log-variances s_i (0 at first; twice the paper's form for regression). Their gradient 1 - exp(-s_i) L_i needs only the
values of the global batch, so it is exact without autograd; a step is `learning_rate` x the gradient, cut at 1. The
recipe's weight multiplies the factor of either kind: it says how strong a loss shall be once all are balanced.
Cost: nothing here; what gradient norms are taken by and cost on the steps that measure them is in gradient_norms.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import TrainingError
from shared.recipe.recipe import Balance

_SMALLEST = 1e-4
"""Factors stay above it, so that no loss is switched off for good."""


class GradNorm:
    """Factors that make gradients comparably strong."""

    def __init__(self, names: Sequence[str], alpha: float, learning_rate: float, every_steps: int = 1) -> None:
        """Begin with factors of 1."""
        self._factors = dict.fromkeys(names, 1.0)
        self._alpha, self._learning_rate, self._every_steps = alpha, learning_rate, every_steps
        self._first: dict[str, float] = {}

    @property
    def factors(self) -> dict[str, float]:
        """b_i of each loss."""
        return self._factors

    def wants_gradient_norms(self, step: int) -> bool:
        """Return whether this is the first step or `every_steps` after one that was measured."""
        return step % self._every_steps == 0

    def observe(self, values: Mapping[str, float], gradient_norms: Mapping[str, float] | None) -> dict[str, Any]:
        """Move the factors by one step where norms were measured."""
        if gradient_norms is None:
            return {}
        strengths = {
            name: factor * gradient_norms[name] for name, factor in self._factors.items() if gradient_norms[name] != 0
        }
        mean_strength = math.fsum(strengths.values()) / max(len(strengths), 1)
        if not 0 < mean_strength < math.inf:
            return {"gradient_norms": dict(gradient_norms)}
        first = {name: self._first.setdefault(name, max(values[name], 1e-12)) for name in strengths}
        ratios = {name: max(values[name], 1e-12) / first[name] for name in strengths}
        mean_ratio = math.fsum(ratios.values()) / len(ratios)
        moved = {}
        for name, strength in strengths.items():
            target = mean_strength * (ratios[name] / mean_ratio) ** self._alpha
            excess, norm = strength - target, gradient_norms[name]
            step = min(self._learning_rate * norm / mean_strength, abs(excess) / norm)
            moved[name] = max(self._factors[name] - math.copysign(step, excess), _SMALLEST)
        left_out = math.fsum(factor for name, factor in self._factors.items() if name not in moved)
        scale = (len(self._factors) - left_out) / math.fsum(moved.values())
        self._factors = self._factors | {name: factor * scale for name, factor in moved.items()}
        return {"gradient_norms": dict(gradient_norms)}

    def state(self) -> dict[str, Any]:
        """Return factors and first values."""
        return {"factors": self._factors, "first_values": self._first}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up factors and first values."""
        _check_names(self._factors, state["factors"])
        self._factors = {name: float(state["factors"][name]) for name in self._factors}
        self._first = {name: float(value) for name, value in state["first_values"].items()}


class Uncertainty:
    """Factors exp(-s) of learned log-variances s."""

    def __init__(self, names: Sequence[str], learning_rate: float) -> None:
        """Begin with log-variances of 0."""
        self._log_variances = dict.fromkeys(names, 0.0)
        self._learning_rate = learning_rate

    @property
    def factors(self) -> dict[str, float]:
        """exp(-s) of each loss."""
        return {name: math.exp(-value) for name, value in self._log_variances.items()}

    def wants_gradient_norms(self, step: int) -> bool:
        """Return that none are needed."""
        return False

    def observe(self, values: Mapping[str, float], gradient_norms: Mapping[str, float] | None) -> dict[str, Any]:
        """Move each log-variance by one step."""
        for name, log_variance in self._log_variances.items():
            slope = 1.0 - math.exp(-log_variance) * values[name]
            if math.isfinite(slope):
                self._log_variances[name] = log_variance - self._learning_rate * min(max(slope, -1.0), 1.0)
        return {"log_variances": dict(self._log_variances)}

    def state(self) -> dict[str, Any]:
        """Return the log-variances."""
        return {"log_variances": self._log_variances}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the log-variances."""
        _check_names(self._log_variances, state["log_variances"])
        self._log_variances = {name: float(state["log_variances"][name]) for name in self._log_variances}


Balancer = GradNorm | Uncertainty
"""Moves factors of losses as their values come."""


def balancer_of(balance: Balance, names: Sequence[str]) -> Balancer | None:
    """Return the balancer of a stage whose losses have these keys; None where weights are fixed."""
    if balance.kind == "grad_norm":
        return GradNorm(names, balance.alpha, balance.learning_rate, balance.every_steps)
    return Uncertainty(names, balance.learning_rate) if balance.kind == "uncertainty" else None


def _check_names(names: Mapping[str, float], found: Mapping[str, Any]) -> None:
    if set(names) != set(found):
        raise TrainingError(
            f"the checkpoint balances the losses {', '.join(sorted(found))} where the stage has "
            f"{', '.join(sorted(names))}; remove the stage's directory to train it again"
        )

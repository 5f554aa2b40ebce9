"""Updates of bfloat16 weights that are never lost: computed in float32 and rounded up or down by chance, so that the
mean is exact.

Rounded to nearest, a weight moves only where its update reaches half of its last bit. Here every weight in turn is
widened, the optimizer steps on it alone with its state in float32 or 8 bits, and the result is cut to bfloat16 after
16 random bits were added below: up with the probability of what is cut off (Gupta et al. 2015, 1502.02551; Zamirai et
al. 2020, 2010.06192, for bfloat16). Chance depends on seed and step alone, so that processes agree and a continued
run repeats them.
Cost: one optimizer call per weight and step; memory beyond the optimizer's: the largest weight and its gradient once
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CUT_BITS = 16
"""Of float32, below those that bfloat16 keeps."""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 `values` as bfloat16, each rounded to a neighbour with the probability that keeps its mean.

    `values` is overwritten. Example: 1 + 2**-9 lies a quarter of the way from 1 to 1 + 2**-7: three times in four it
    becomes 1.
    """
    bits = values.view(torch.int32)
    chance = torch.randint(1 << _CUT_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits.add_(chance.masked_fill_(~values.isfinite(), 0)).bitwise_and_(-(1 << _CUT_BITS))
    return values.to(torch.bfloat16)


class StochasticRounding(torch.optim.Optimizer):  # type: ignore[misc]  # torch has no types here
    """An optimizer whose bfloat16 weights are updated in float32 and rounded by chance."""

    def __init__(self, inner: torch.optim.Optimizer, seed: int, step_of: Callable[[], int]) -> None:
        """Take an optimizer that skips weights without a gradient and keeps no count of steps outside of each
        weight's state; `step_of` says how many steps were made.
        """
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._seed, self._step_of = inner, seed, step_of
        self._share()

    def _share(self) -> None:
        """Have the groups and the state of the inner optimizer: schedules and checkpoints see those."""
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """Make one step of all weights."""
        assert closure is None
        narrow = [weight for weight in self._narrow() if weight.grad is not None]
        gradients = {weight: weight.grad for weight in narrow}
        for weight in narrow:
            weight.grad = None
        self._inner.step()  # of weights in float32, where there are any
        self._inner.zero_grad()
        if not narrow:
            return
        generator = torch.Generator(narrow[0].device)
        # a CPU generator sees the low 32 bits of its seed alone, so both numbers are mixed into them
        generator.manual_seed(int(np.random.SeedSequence([self._seed, self._step_of()]).generate_state(1)[0]))
        for weight in narrow:
            kept = weight.data
            weight.data = kept.float()
            weight.grad = gradients.pop(weight).float()
            self._inner.step()
            weight.grad = None
            kept.copy_(round_stochastically(weight.data, generator))
            weight.data = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state."""
        state: dict[str, Any] = self._inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give it back, in the types that it was saved in: a stock optimizer would cast it to the weights'."""
        with self._widened():
            self._inner.load_state_dict(state_dict)
        self._share()

    def _narrow(self) -> list[Tensor]:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        return [weight for weight in weights if weight.dtype == torch.bfloat16]

    @contextmanager
    def _widened(self) -> Any:
        """Let bfloat16 weights pass for float32 ones, without their numbers."""
        kept = {weight: (weight.data, weight.grad) for weight in self._narrow()}
        for weight in kept:
            weight.grad = None
            weight.data = torch.empty(0, dtype=torch.float32, device=weight.device)
        try:
            yield
        finally:
            for weight, (data, gradient) in kept.items():
                weight.data = data
                weight.grad = gradient

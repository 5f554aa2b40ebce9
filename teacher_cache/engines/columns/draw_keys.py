"""Uniform numbers for draws that depend on a row and the text before a position, not on batching or engine.

A position's key is a 64-bit hash of the tokens up to and including the one that the position's hidden state belongs to,
mixed with a salt of the row. Without the salt equal contexts share their draws (the first position of every plain text,
the first answered token of a prompt's samples), and what one set of draws gets wrong there no number of rows averages
out: so only layers do that were begun before rows had salts (`draw_key` of their identity). Uniform number j at a
temperature is a counter-based mix (splitmix64, Steele et al. 2014) of key, temperature and j, stratified: (j + u) / m.
Each draw's expected counts are those of independent draws, with less variance, and two engines that agree on the
distribution agree on the draws.
Cost: a few integer operations per token and draw.

Shape letters: T tokens of a sequence, P positions, m draws per position.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the 64-bit two's complement reading of an unsigned constant: torch has no uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 right as if unsigned."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: torch.Tensor) -> torch.Tensor:
    """Scramble int64 values one by one (splitmix64's finaliser; sums and products wrap)."""
    values = (values ^ _shift_right(values, 30)) * _signed(MIX_1)
    values = (values ^ _shift_right(values, 27)) * _signed(MIX_2)
    return values ^ _shift_right(values, 31)


def prefix_keys(token_ids: torch.Tensor) -> torch.Tensor:
    """Return [..., T] int64 keys; entry t depends on ids 0..t and their order.

    A wrapping sum of scrambled (id, place) pairs, so that a whole sequence costs one cumulative sum.
    """
    places = torch.arange(1, token_ids.shape[-1] + 1, device=token_ids.device, dtype=torch.int64)
    return mix(mix(token_ids.to(torch.int64) + places * _signed(GOLDEN)).cumsum(-1))


def prefix_keys_of(token_ids: NDArray[np.int32] | list[int]) -> torch.Tensor:
    """Return [T] int64 keys of one sequence, on the CPU."""
    return prefix_keys(torch.as_tensor(np.asarray(token_ids, dtype=np.int64)))


def salted(keys: torch.Tensor, salts: int | torch.Tensor) -> torch.Tensor:
    """Return [P] keys mixed with a row's salt, or with [P] salts; salt 0 leaves a key as it is."""
    salts = torch.as_tensor(salts, dtype=torch.int64, device=keys.device)
    return torch.where(salts == 0, keys, mix(keys ^ salts))


def uniforms(keys: torch.Tensor, temperature: float, num_draws: int) -> torch.Tensor:
    """Return [P, m] float64 numbers in [0, 1), the j-th within [j / m, (j + 1) / m).

    Args:
        keys: [P] int64.
        temperature: gives each temperature its own numbers.
        num_draws: m.
    """
    salt = int(np.float64(temperature).view(np.int64))
    counters = torch.arange(1, num_draws + 1, device=keys.device, dtype=torch.int64) * _signed(GOLDEN)
    mixed = mix(mix(keys ^ salt)[:, None] + counters)
    unit = _shift_right(mixed, 11).to(torch.float64) * 2.0**-53
    strata = torch.arange(num_draws, device=keys.device, dtype=torch.float64)
    return (strata + unit) / num_draws

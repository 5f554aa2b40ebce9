"""Do a model's tokens see what comes after them? Then what it says of the next one is no prediction.

Two rows begin alike and end differently; the states where they are alike must be alike. Cost: one pass of two rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ROUNDING = 1e-4
"""Largest difference of a token's state that counts as rounding in float32, over the states' standard deviation."""


PREFIX = (
    "reads prompts in both directions where it is told which tokens they are (`prefix_lm: true` of its config.json), "
    "and rows are read from left to right here; set prefix_lm to false to take it so, or choose another model"
)
"""What is said of a model whose prompts are read in another way than it was trained on."""


QUANTISED_ROUNDING = 5e-2
"""The same of quantised weights, whose kernels may round all tokens of a pass by one scale."""


def sees_what_follows(model: Any, run: Callable[[Any], Any], row: Any, vocab_size: int) -> bool:
    """Say whether states of the first half of a row depend on its second half.

    Args:
        model: of transformers.
        run: its states [2, T, H] of tokens [2, T], in float32 where it can.
        row: [1, T] tokens.
        vocab_size: ids are below it.
    """
    rows, half = row.repeat(2, 1), row.shape[1] // 2
    rows[1, half:] = (rows[1, half:] + vocab_size // 2) % vocab_size
    states = run(rows)[:, :half].float()
    tolerance = ROUNDING if getattr(model, "hf_quantizer", None) is None else QUANTISED_ROUNDING
    return bool((states[0] - states[1]).abs().mean(-1).max() > tolerance * states.std())

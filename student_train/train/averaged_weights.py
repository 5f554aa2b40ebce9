"""The weights that count, where an optimizer trains others.

A schedule-free optimizer (Defazio et al. 2024, 2405.15682) takes gradients at a point between its steps and their
average, and the average is the model. It switches the weights to that average with `eval()` and back with `train()`,
which the stock Trainer calls before every forward pass of a step but not before it saves.
Cost: of `averaged`, one more copy of the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def settle(optimizer: Any) -> None:
    """Switch the trained weights to their average until the next step, if the optimizer keeps one."""
    switch = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Have the average in the trained weights for a while, and give them back bit by bit."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has `eval` around every optimizer
    if not callable(getattr(inner, "eval", None)):
        yield
        return
    weights = [weight for group in inner.param_groups for weight in group["params"]]
    kept = [weight.detach().clone() for weight in weights]
    inner.eval()
    was_settled = all(torch.equal(weight, value) for weight, value in zip(weights, kept, strict=True))
    try:
        yield
    finally:
        if not was_settled:
            inner.train()
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)

"""What a loss on a hidden layer of the cache is: it sees states or attention of the student's body, not the head's
masses.

Such a loss is a pure function of the student's tensors and the teacher's, in one file each; where the tensors come from
is the concern of layer_losses.py. It has no temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Reads = Literal["states", "attention", "pooled"]
"""What of a hidden layer a loss needs."""


@dataclass(frozen=True, slots=True)
class Representation:
    """A loss between what student and teacher have inside."""

    function: Callable[..., Tensor]
    """Student tensors, teacher tensors and options to one value per position or row; differentiable in the student's.
    """
    reads: Reads
    """What of the hidden layer it needs."""
    options: tuple[str, ...] = ()
    """Names of its keyword options."""

"""What a divergence is to the operator: a function of k+1 log-masses, and a term that uses it.

The operator reduces a position to masses: one per member of the teacher's support and one bucket for everything else. A
divergence sees only their natural logs and returns nats; it knows nothing of vocabularies, heads, temperatures or
chunks, and its gradient comes from autograd over [C, M] numbers.

Shape letters: C positions of a chunk, M masses (members and the bucket).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ZERO_LOG_MASS = -100.0
"""Natural log that stands for an empty mass: exp(-100) is nothing beside any probability, and no formula turns it into
NaN.
"""
_BELOW_ALL = -1e6
"""Natural log that is below that of every mass that a softmax gives, so that a sum of masses does not see it."""


def without_padding(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-masses [C, M] whose padded slots, those of an empty mass but for the bucket, no sum of masses sees.

    A student may give all of a head, or all of a tail, less than what stands for an empty mass.

    >>> p, q = without_padding(torch.tensor([[-0.1, -100.0, -2.3]]), torch.tensor([[-150.0, -100.0, 0.0]]))
    >>> q[:, :2].logsumexp(1)
    tensor([-150.])
    """
    is_padded = log_p == ZERO_LOG_MASS
    is_padded = torch.cat([is_padded[:, :-1], torch.zeros_like(is_padded[:, -1:])], 1)
    return log_p.masked_fill(is_padded, _BELOW_ALL), log_q.masked_fill(is_padded, _BELOW_ALL)


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence between two distributions over the same masses."""

    function: Callable[..., Tensor]
    """`function(log_p [C, M], log_q [C, M], **options) -> [C]` in nats; p the teacher, q the student; differentiable in
    log_q.
    """
    options: tuple[str, ...] = ()
    """Names of its keyword options."""
    on_labels: bool = False
    """Taken against the token that follows instead of the teacher's masses, always at temperature 1."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of a training loss at one step: schedules are resolved."""

    name: str
    """Key of the registry."""
    weight: float = 1.0
    """What its value is multiplied by."""
    temperature: float = 1.0
    """Temperature of both sides; its value and gradient are multiplied by the square."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword options of the loss."""
    layer: str = ""
    """Which of several teachers a divergence is from; empty where there is one, and for labels."""
    by_entropy: bool = False
    """Each position is weighted by the teacher's entropy over head and bucket, in nats, at the temperature."""

"""What a loss on the likelihood of chunks is: it sees the log-likelihoods of aligned pieces of text, not masses.

A chunk is some of the student's tokens whose text the teacher wrote too, perhaps in other tokens. Where they come from:
student_train/operator/chunk_likelihood.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A loss between the likelihoods that teacher and student give to chunks of the text."""

    function: Callable[..., Tensor]
    """`function(log_p [A], log_q [A], **options) -> [A]` in nats; differentiable in log_q."""
    options: tuple[str, ...] = ()
    """Names of its keyword options."""

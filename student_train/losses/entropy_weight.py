"""Weights of positions by the teacher's entropy over head and tail, in nats: what is decided weighs nothing.

A lower bound of the teacher's entropy, since the tail counts as one outcome; drawn tokens are put together again, so
draws and bucket give the same weight. Where the teacher is sure of the next token the text already says it all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_weights(log_p: Tensor, num_head: int) -> Tensor:
    """Return [C] entropies in nats of log-masses [C, M]: the first `num_head`, and the rest together.

    >>> entropy_weights(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), num_head=2)  # halves and two quarters
    tensor([1.0397])
    """
    masses = torch.cat([log_p[:, :num_head], torch.logsumexp(log_p[:, num_head:], 1, keepdim=True)], 1)
    return -(masses.exp() * masses).sum(1)

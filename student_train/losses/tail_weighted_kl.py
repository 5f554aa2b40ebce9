"""Forward KL with its tail weighted: KL over head and bucket + tail_weight · p_T KL(p | tail || q | tail), in nats.

At weight 1 it is `forward_kl`. Above 1 the shape of the tail counts for more than its share of the mass gives it, which
plain KL leaves to the few most likely tokens (2602.20816). The shape is known from drawn tokens alone; where a position
has none, what is left is the KL over head and bucket. Linear in p, so draws give the right gradient on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.divergence import Divergence, without_padding
from student_train.losses.forward_kl import forward_kl


def tail_weighted_kl(log_p: Tensor, log_q: Tensor, tail_weight: float = 2.0, num_head: int | None = None) -> Tensor:
    """Return [C] the divergence in nats of log-masses [C, M], of which the first `num_head` are the head's.

    Without `num_head` all but the last are, and there is no tail to weigh.
    """
    first = log_p.shape[1] - 1 if num_head is None else num_head
    log_p, log_q = without_padding(log_p, log_q)
    log_p_tail, log_q_tail = log_p[:, first:], log_q[:, first:]
    whole_p, whole_q = torch.logsumexp(log_p_tail, 1), torch.logsumexp(log_q_tail, 1)
    tail = forward_kl(log_p_tail, log_q_tail) - whole_p.exp() * (whole_p - whole_q)
    return forward_kl(log_p, log_q) + (tail_weight - 1.0) * tail


LOSS = Divergence(tail_weighted_kl, options=("tail_weight",))

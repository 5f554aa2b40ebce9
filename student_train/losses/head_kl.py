"""Forward KL within the head: both sides given that the token is one of the teacher's, in nats.

What a teacher's head says of its own members needs no mass outside it, so this is right where that mass is unknown. It
moves no probability into or out of the head: add cross-entropy for that.
"""

from __future__ import annotations

from torch import Tensor

from student_train.losses.divergence import Divergence, without_padding


def head_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return [C] KL(p(.|head) || q(.|head)) in nats of log-masses [C, M], whose last is the bucket."""
    log_p, log_q = without_padding(log_p, log_q)
    log_p, log_q = (log[:, :-1] - log[:, :-1].logsumexp(-1, keepdim=True) for log in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


LOSS = Divergence(head_kl)

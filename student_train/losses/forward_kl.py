"""Forward KL: sum_b p_b log(p_b / q_b), in nats.

The student covers everything that the teacher does (Hinton et al., 1503.02531).
"""

from __future__ import annotations

from torch import Tensor

from student_train.losses.divergence import Divergence


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return [C] KL(p || q) in nats of log-masses [C, M]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


LOSS = Divergence(forward_kl)

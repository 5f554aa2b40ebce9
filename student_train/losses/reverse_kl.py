"""Reverse KL: sum_b q_b log(q_b / p_b), in nats. The student keeps to what the teacher finds likely (MiniLLM,
2306.08543).
"""

from __future__ import annotations

from torch import Tensor

from student_train.losses.divergence import Divergence


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return [C] KL(q || p) in nats of log-masses [C, M]."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


LOSS = Divergence(reverse_kl)

"""Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD,
2306.13649).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_train.losses.divergence import Divergence


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Return [C] the Jensen-Shannon divergence in nats of log-masses [C, M].

    `beta`, between 0 and 1, is the teacher's share of the mixture.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher_part = (log_p.exp() * (log_p - log_m)).sum(-1)
    student_part = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher_part + (1.0 - beta) * student_part


LOSS = Divergence(jsd, options=("beta",))

"""Skew reverse KL: KL(q || skew q + (1 - skew) p), in nats.

Bounded by -log(skew), where reverse KL explodes (DistiLLM, 2402.03898).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_train.losses.divergence import Divergence


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return [C] the skew reverse KL in nats of log-masses [C, M].

    `skew`, between 0 and 1, is the student's share of the mixture.
    """
    log_m = torch.logaddexp(log_q + math.log(skew), log_p + math.log1p(-skew))
    return (log_q.exp() * (log_q - log_m)).sum(-1)


LOSS = Divergence(skew_reverse_kl, options=("skew",))

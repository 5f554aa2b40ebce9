"""Skew forward KL: KL(p || skew p + (1 - skew) q), in nats.

Bounded by -log(skew), so no token dominates (DistiLLM, 2402.03898).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student_train.losses.divergence import Divergence


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return [C] the skew forward KL in nats of log-masses [C, M].

    `skew`, between 0 and 1, is the teacher's share of the mixture.
    """
    log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    return (log_p.exp() * (log_p - log_m)).sum(-1)


LOSS = Divergence(skew_forward_kl, options=("skew",))

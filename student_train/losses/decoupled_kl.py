"""Decoupled KL: KL of the head's mass against the bucket's, at T = 1, + p_K T² KL(p | head || q | head) at T, in nats.

The head's conditional distribution at T needs no sum over the vocabulary, so any temperature will do, also one that was
not captured; at T = 1 it is forward KL over head and bucket. What it leaves out is how much of the teacher's mass at T
lies outside the head. After the decoupling of Zhao et al. (2203.08679), with the head in place of the target class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.divergence import Divergence, without_padding
from student_train.losses.forward_kl import forward_kl


def decoupled_kl(log_p: Tensor, log_q: Tensor, head_temperature: float = 2.0) -> Tensor:
    """Return [C] the divergence in nats of log-masses [C, M] at T = 1, the bucket's last."""
    if log_p.shape[1] == 1:  # no position has a head: nothing but the bucket
        return forward_kl(log_p, log_q)
    log_p, log_q = without_padding(log_p, log_q)
    halves = [torch.stack([torch.logsumexp(log[:, :-1], 1), log[:, -1]], 1) for log in (log_p, log_q)]
    sharp_p, sharp_q = ((log[:, :-1] / head_temperature).log_softmax(1) for log in (log_p, log_q))
    within = forward_kl(sharp_p, sharp_q)
    return forward_kl(*halves) + halves[0][:, 0].exp() * head_temperature**2 * within


LOSS = Divergence(decoupled_kl, options=("head_temperature",))

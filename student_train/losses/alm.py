"""Approximate likelihood matching: is a chunk of text as likely to the student as to the teacher (2503.20083)?

With P and Q the likelihoods of a chunk, p = P^(1/tau) and q = Q^(1/tau): tau (p log(p/q) + (1 - p) log((1 - p) / (1 -
q))), the KL of "this chunk" against "another one", where tau keeps long chunks from being impossible on both sides. The
factor tau makes its size independent of tau where that is large: with x and y the negative log-likelihoods in nats it
goes to x log(x / y) - x + y, which is 0 only at y = x.

Shape letters: A chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.likelihood import Likelihood

LEAST_NATS = 1 / 512
"""Chunks are no surer than a stored label can say."""


def alm(log_p: Tensor, log_q: Tensor, tau: float = 100.0) -> Tensor:
    """Return [A] values in nats of log-likelihoods [A] under teacher and student."""
    log_p, log_q = log_p.clamp_max(-LEAST_NATS) / tau, log_q.clamp_max(-LEAST_NATS) / tau
    other_p, other_q = (torch.log(-torch.expm1(x)) for x in (log_p, log_q))
    return tau * (log_p.exp() * (log_p - log_q) + other_p.exp() * (other_p - other_q))


LOSS = Likelihood(alm, options=("tau",))

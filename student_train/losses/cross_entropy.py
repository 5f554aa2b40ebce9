"""Cross-entropy: -sum_b p_b log q_b, in nats.

The operator calls it with the label as the only mass, where it is -log q(label).
"""

from __future__ import annotations

from torch import Tensor

from student_train.losses.divergence import Divergence


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return [C] the cross-entropy in nats of log-masses `log_q` under `log_p`, both [C, M]."""
    return -(log_p.exp() * log_q).sum(-1)


LOSS = Divergence(cross_entropy, on_labels=True)

"""InfoNCE: each row's pooled student state is to recognise its own teacher state among those of the batch, in nats.

With s_i and t_j of length 1: -log softmax_j(s_i.t_j / tau) at j = i; gradient by s_i: (sum_j w_j t_j - t_i) / tau, w
that softmax. Other rows of the forward pass are the negatives, so a pass of one row has value and gradient 0 (van den
Oord et al., 1807.03748; as
distillation: Tian et al., 1910.10699).

Shape letters: R rows of a forward pass, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.hidden_layers.representation import Representation

_LEAST_LENGTH = 1e-6


def info_nce(student: Tensor, teacher: Tensor, *, tau: float = 0.07) -> Tensor:
    """Return [R] values in nats of [R, D] projected student states against the teacher's."""
    student = torch.nn.functional.normalize(student, dim=-1, eps=_LEAST_LENGTH)
    teacher = torch.nn.functional.normalize(teacher, dim=-1, eps=_LEAST_LENGTH)
    return -(student @ teacher.T / tau).log_softmax(-1).diagonal()


LOSS = Representation(info_nce, reads="pooled", options=("tau",))

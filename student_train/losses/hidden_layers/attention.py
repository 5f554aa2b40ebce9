"""KL of the teacher's head-averaged attention from the student's, over the stored keys and one bucket for all others,
in nats.

The masses are p_1..p_m and the rest p_r of the teacher, q_1..q_m and q_r of the student: sum p log(p / q), gradient by
q: -p / q.
As for the head, the bucket keeps both sides honest: the student's mass elsewhere is pulled to the teacher's, its shape
there is free. After Zagoruyko and Komodakis (1612.03928) and the attention transfer of MiniLM (2002.10957).

Shape letters: S positions, M stored keys of the longest query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.hidden_layers.representation import Representation

_LEAST_MASS = 1e-12


def attention_kl(student: Tensor, student_rest: Tensor, teacher: Tensor, teacher_rest: Tensor) -> Tensor:
    """Return [S] KL in nats; masses of keys [S, M] (0 in the teacher's padded slots) and of the rest [S]."""
    p = torch.cat([teacher, teacher_rest[:, None]], dim=-1)
    q = torch.cat([student, student_rest[:, None]], dim=-1)
    return (torch.xlogy(p, p) - p * q.clamp_min(_LEAST_MASS).log()).sum(-1)


LOSS = Representation(attention_kl, reads="attention")

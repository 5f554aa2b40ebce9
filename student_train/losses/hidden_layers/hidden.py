"""Distance of projected student states from teacher states (FitNets, 1412.6550; cosine as in DistilBERT, 1910.01108).

With t the teacher's vector, x = W h the student's after its learned projection, D their width:
mse: |x - t|^2 / D, gradient by x: 2 (x - t) / D; `normalise` divides t by its root mean square first, so that layers of
large states weigh no more than others. cosine: 1 - x.t / (|x| |t|), gradient by x: (x^ cos - t^) / |x| with x^, t^ of
length 1.

Shape letters: S positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.hidden_layers.representation import Representation

_LEAST_LENGTH = 1e-6


def hidden_distance(student: Tensor, teacher: Tensor, *, metric: str = "mse", normalise: bool = True) -> Tensor:
    """Return [S] distances of [S, D] projected student vectors from the teacher's."""
    if metric == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1, eps=_LEAST_LENGTH)
    if normalise:
        teacher = teacher / teacher.square().mean(-1, keepdim=True).sqrt().clamp_min(_LEAST_LENGTH)
    return (student - teacher).square().mean(-1)


LOSS = Representation(hidden_distance, reads="states", options=("metric", "normalise"))

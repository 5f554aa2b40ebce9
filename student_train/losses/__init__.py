"""Losses between teacher and student, one per file, and the registry of their names."""

from __future__ import annotations

from student_train.losses.attention import ATTENTION
from student_train.losses.contrastive import CONTRASTIVE
from student_train.losses.cross_entropy import CROSS_ENTROPY
from student_train.losses.divergence import ZERO_LOG_MASS, Divergence, LossTerm
from student_train.losses.forward_kl import FORWARD_KL
from student_train.losses.hidden import HIDDEN
from student_train.losses.jsd import JSD
from student_train.losses.representation import Representation
from student_train.losses.reverse_kl import REVERSE_KL
from student_train.losses.skew_forward_kl import SKEW_FORWARD_KL
from student_train.losses.skew_reverse_kl import SKEW_REVERSE_KL

divergences: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (CROSS_ENTROPY, FORWARD_KL, REVERSE_KL, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL)
}
"""Losses of the head, by the name that a recipe gives them."""

representations: dict[str, Representation] = {loss.name: loss for loss in (HIDDEN, ATTENTION, CONTRASTIVE)}
"""Losses of what is inside, on a hidden layer of the cache, likewise."""

registry: dict[str, Divergence | Representation] = {**divergences, **representations}
"""Every loss by the name that a recipe gives it."""

__all__ = ["ZERO_LOG_MASS", "Divergence", "LossTerm", "Representation", "divergences", "registry", "representations"]

"""Divergences between teacher and student, one per file, and the registry of their names."""

from __future__ import annotations

from student_train.losses.cross_entropy import CROSS_ENTROPY
from student_train.losses.divergence import ZERO_LOG_MASS, Divergence, LossTerm
from student_train.losses.forward_kl import FORWARD_KL
from student_train.losses.jsd import JSD
from student_train.losses.reverse_kl import REVERSE_KL
from student_train.losses.skew_forward_kl import SKEW_FORWARD_KL
from student_train.losses.skew_reverse_kl import SKEW_REVERSE_KL

registry: dict[str, Divergence] = {
    divergence.name: divergence for divergence in (CROSS_ENTROPY, FORWARD_KL, REVERSE_KL, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL)
}
"""Every divergence by the name that a recipe gives it."""

__all__ = ["ZERO_LOG_MASS", "Divergence", "LossTerm", "registry"]

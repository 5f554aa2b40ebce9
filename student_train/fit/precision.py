"""Do the weights take their updates, and does a GPU compute as fast as it can? What `plan` and `train` say of both.

A weight kept in bfloat16 has 7 bits below its leading one: an update of less than half of the last bit rounds back to
where it was. A full step of Adam moves every weight by the learning rate, so the share of weights that move at all
follows from their sizes: the exact share for weights of N(0, 0.02), the size of most language models' weights.
Cost: nothing.
"""

from __future__ import annotations

import math

from shared.recipe.sections.optimizers import OPTIMIZERS
from shared.recipe.sections.training import Stage, Student

WEIGHT_DEVIATION = 0.02
_BITS = {"bfloat16": 7, "float16": 10}
"""Bits of a number below its leading one."""
LEAST_LEARNING_RATE = {"bfloat16": 1e-4, "float16": 1.25e-5}
"""From here on a full step moves nearly every weight (88 %)."""
LEAST_EPSILON_FLOAT16 = 1e-5


def share_moved(learning_rate: float, dtype: str = "bfloat16") -> float:
    """Return the share of weights that a step of `learning_rate` moves where results are rounded to nearest.

    >>> [round(share_moved(rate), 2) for rate in (1e-5, 2e-5, 5e-5, 1e-4)]
    [0.15, 0.3, 0.57, 0.88]
    """
    largest_power = math.ceil(math.log2(learning_rate * 2 ** (_BITS[dtype] + 1)))  # half a last bit is below the step
    return math.erf(2.0**largest_power / (WEIGHT_DEVIATION * math.sqrt(2)))


def loses_updates(stage: Stage, student: Student) -> bool:
    """Return whether a stage rounds much of its updates away."""
    least = LEAST_LEARNING_RATE.get(student.dtype, 0.0)
    is_plain = student.adapter.trains_all_weights and stage.trainer.rounding == "nearest"
    return is_plain and stage.trainer.learning_rate < least


def divides_by_nothing(stage: Stage, student: Student) -> bool:
    """Return whether a stage divides float16 weights' updates by squares that are 0 there, as small an epsilon is, too.

    *Measured* on 40 steps at learning rate 1e-4: a loss of 0.13 with epsilon 1e-5; NaN from step 2 on with 1e-7 and
    adamw_torch, and 17 with 1e-8 and adamw_torch_fused.
    """
    optimizer = OPTIMIZERS[stage.trainer.optim]
    epsilon = stage.trainer.adam_epsilon if "adam_epsilon" in optimizer.reads else 0.0
    is_narrow = student.dtype == "float16" and student.adapter.trains_all_weights
    return is_narrow and optimizer.keeps_narrow_squares and epsilon < LEAST_EPSILON_FLOAT16


def precision_notes(stage: Stage, student: Student, *, on_gpu: bool) -> list[str]:
    """Return a sentence on each way in which a stage's types of numbers work against it."""
    trainer, notes = stage.trainer, []
    if loses_updates(stage, student):
        other = "trainer.rounding: stochastic, or " if student.dtype == "bfloat16" else ""
        notes.append(
            f"weights are kept in {student.dtype} and a full step at learning rate {trainer.learning_rate:g} moves "
            f"{share_moved(trainer.learning_rate, student.dtype):.0%} of them, the rest rounds back; set {other}"
            "student.dtype: float32 with trainer.bf16: true"
        )
    if divides_by_nothing(stage, student):
        reads = "adam_epsilon" in OPTIMIZERS[trainer.optim].reads
        other = f"trainer.adam_epsilon: {LEAST_EPSILON_FLOAT16:g}, or " if reads else ""
        notes.append(
            f"weights are kept in float16, where {trainer.optim} divides by squares of small gradients that are 0, and "
            f"the loss soon is NaN or large; set {other}student.dtype: float32"
        )
    if on_gpu and student.dtype == "float32" and not (trainer.bf16 or trainer.fp16 or trainer.tf32):
        notes.append(
            "everything is multiplied in plain float32, which leaves a GPU's tensor cores idle; set trainer.bf16: true "
            "(weights stay in float32)"
        )
    return notes

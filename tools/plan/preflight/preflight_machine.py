"""What is known of this machine to be wrong with the stages before any work: GPUs, packages, processes and schedules
that their settings need. Hours of a teacher would pass before the stage itself says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from shared.recipe.base import Problem
from shared.recipe.recipe import Student
from shared.recipe.sections.training import StageTrainer
from tools.plan.preflight.preflight_asked import Asked, Place, said

_WITHOUT_OPTIONS = ("constant", "constant_with_warmup", "linear", "cosine")
"""Schedules of the learning rate that need none."""


def machine_problems(asked: Asked) -> Iterator[Problem]:
    """Check the student's settings and those of each stage's trainer; where it is only planned, the schedules alone."""
    student = asked.recipe.student
    if student is None or asked.elsewhere:
        return
    if not asked.plans_only:
        yield from _student(student)
    for i, stage in enumerate(asked.recipe.stages):
        place = ("stages", i, "trainer")
        yield from _schedule(place, stage.trainer)
        if not asked.plans_only:
            yield from _trainer(place, student, stage.trainer)


def _student(student: Student) -> Iterator[Problem]:
    if student.liger:
        from student_train.student.liger import check_liger

        yield from said(("student", "liger"), partial(check_liger, wanted=True))
    if student.attention == "flash_attention_2" or student.adapter.holds_4_bits:
        from student_train.student.student import check_packages

        key = "adapter" if student.adapter.holds_4_bits else "attention"
        yield from said(("student", key), partial(check_packages, student))


def _schedule(place: Place, trainer: StageTrainer) -> Iterator[Problem]:
    if trainer.lr_scheduler_kwargs or trainer.lr_scheduler_type not in _WITHOUT_OPTIONS:
        from student_train.train.training_problems import check_schedule

        yield from said((*place, "lr_scheduler_type"), partial(check_schedule, trainer))


def _trainer(place: Place, student: Student, trainer: StageTrainer) -> Iterator[Problem]:
    if trainer.tf32 or trainer.fp16:
        from student_train.train.training_problems import check_precision

        yield from said((*place, "tf32" if trainer.tf32 else "fp16"), partial(check_precision, trainer))
    if trainer.operator == "triton":
        import torch

        from student_train.operator.operator_choice import operator_for

        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield from said((*place, "operator"), partial(operator_for, "triton", device))
    if trainer.fsdp != "none":
        from student_train.train.sharding import check_sharding

        yield from said((*place, "fsdp"), partial(check_sharding, student, trainer))

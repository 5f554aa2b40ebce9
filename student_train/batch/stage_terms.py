"""A stage's losses at each step: which temperatures they take, whether they need a teacher, which terms they are now.

Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.recipe.recipe import Stage
from shared.recipe.sections.losses import OnTargets
from shared.recipe.sections.target_layers import TargetLayer, layer_keys
from student_train.losses import LossTerm, registry, representations
from student_train.losses.hidden_layers.representation import Reads
from student_train.order import schedules
from student_train.order.schedules import RunSteps


def hidden_reads(stage: Stage) -> frozenset[Reads]:
    """Return what the losses of a stage read of a hidden layer; nothing where none does."""
    return frozenset(representations[loss.name].reads for loss in stage.losses if loss.name in representations)


def training_temperatures(stage: Stage) -> tuple[float, ...]:
    """Return every temperature that a stage's divergences take, and 1, ascending."""
    on_targets = [loss for loss in stage.losses if loss.learns_from == "targets"]
    return tuple(sorted({1.0, *(value for loss in on_targets for value in loss.temperature.extremes())}))


def terms_at(stage: Stage, step: int, num_steps: int, run: RunSteps | None = None) -> list[LossTerm]:
    """Return a stage's loss terms at an optimizer step, counted from 0; `run` where a schedule goes over all stages."""
    terms: list[LossTerm] = []
    for loss in stage.losses:
        options = {name: getattr(loss, name) for name in registry[loss.name].options}
        weight = schedules.value(loss.weight, step, num_steps, run)
        temperature = schedules.value(loss.temperature, step, num_steps, run)
        by_entropy = isinstance(loss, OnTargets) and loss.weigh == "entropy"
        term = LossTerm(loss.name, weight, temperature, options, by_entropy=by_entropy)
        if isinstance(stage.targets, tuple) and loss.learns_from == "targets":
            terms += _of_each_teacher(stage.targets, term, step, num_steps, run)
        else:
            terms.append(term)
    return terms


def _of_each_teacher(
    targets: Sequence[TargetLayer], term: LossTerm, step: int, num_steps: int, run: RunSteps | None
) -> list[LossTerm]:
    """Return a divergence once per teacher, its weight times the teacher's."""
    weights = [schedules.value(entry.weight, step, num_steps, run) for entry in targets]
    return [
        replace(term, weight=term.weight * weight, layer=key)
        for key, weight in zip(layer_keys(targets), weights, strict=True)
    ]

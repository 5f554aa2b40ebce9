"""Before the first step: does a step at the longest packs fit the card? Measured, not believed.

Forward and backward pass of the stage's longest batch run once on the GPU without an update; the optimizer's state,
which is not there yet, is added by arithmetic (memory.py), and a share for what the allocator cannot put to use. Where
that is more than is free on the card (others may use it too), `gradient_checkpointing: auto` turns on recomputation and
measures again; otherwise the stage stops with a sentence that names the terms, instead of dying hours later.
Cost: one or two forward and backward passes. A CPU has no card to overfill, so nothing is measured there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.atomic import write_atomic
from shared.errors import TrainingError
from shared.recipe.recipe import Stage, StageTrainer, Student
from shared.recipe.sections.training import recomputation
from student_train.batch.collate import collate
from student_train.fit.memory import ALONE, FRAGMENTATION, GIB, StepContext, StepMemory
from student_train.fit.model_shape import ModelShape, shape_of
from student_train.records.processes import num_processes

MOST_PACKS_LOOKED_AT = 4096
Measure = Callable[[bool], int | None]
"""Whether activations are recomputed -> most bytes of tensors during forward and backward pass; None: they did not fit.
"""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a card has for the tensors of this process."""

    free_bytes: int
    """What is free and what the process holds already, without its context and what others take."""
    card_bytes: int


@dataclass(frozen=True, slots=True)
class FirstStep:
    """What was planned, measured and decided."""

    gradient_checkpointing: bool
    planned_bytes: int
    """Tensors of a step, by arithmetic."""
    measured_bytes: int
    """Tensors of its forward and backward pass."""
    needed_bytes: int
    """Tensors of a step, from what was measured, and the allocator's gaps between them."""
    free_bytes: int
    card_bytes: int

    def text(self) -> str:
        """Say it in a line."""
        numbers = (self.needed_bytes, self.free_bytes, self.card_bytes, self.planned_bytes)
        needed, free, card, planned = (f"{value / GIB:.1f}" for value in numbers)
        recomputes = ", activations are recomputed" if self.gradient_checkpointing else ""
        return (
            f"a step needs {needed} of {free} GiB that are free of the card's {card}, measured at the longest packs "
            f"(tensors planned: {planned}){recomputes}"
        )


def check_first_step(
    stage: Stage,
    student: Student,
    shape: ModelShape,
    memory: DeviceMemory,
    measure: Measure,
    context: StepContext = ALONE,
) -> FirstStep:
    """Return how the stage's steps fit the card; `context`: its processes, and the hidden layer that its losses read.

    Raises:
        TrainingError: they do not, whatever the recipe allows.
    """
    trainer = stage.trainer
    least: int | None = None
    for recomputes in {True: [True], "auto": [False, True], False: [False]}[recomputation(student, trainer)]:
        step = StepMemory(shape, student, trainer, context, recomputes)
        planned, measured = step.estimate(), measure(recomputes)
        if measured is None:
            continue
        needed = int(step.measured_bytes(measured) * (1 + FRAGMENTATION))
        least = needed if least is None else min(least, needed)
        if needed <= memory.free_bytes:
            return FirstStep(recomputes, planned.allocated, measured, needed, memory.free_bytes, memory.card_bytes)
    terms = ", ".join(f"{name} {value / GIB:.1f}" for name, value in list(planned.terms().items())[:3])
    needs = "more than fits" if least is None else f"{least / GIB:.1f} GiB"
    change = "" if recomputes else "set gradient_checkpointing: auto, or "
    free, card = memory.free_bytes / GIB, memory.card_bytes / GIB
    cards = f"{context.num_processes}x" if context.num_processes > 1 else ""
    raise TrainingError(
        f"a step of stage '{stage.name}' at its longest packs needs {needs} where {free:.1f} of the GPU's {card:.1f} "
        f"GiB are free for it (planned, in GiB: {terms}); {change}end what else uses the GPU, or take what `decant "
        f"plan --card {cards}{max(int(free), 1)}GiB` proposes"
    )


def fit_first_step(work: Any, trainer: Any, base: Any, write_to: Path | None) -> FirstStep | None:
    """Measure a stage's first step on its GPU and turn on what it needs; None where there is nothing to measure.

    Args:
        work: the stage.
        trainer: its `DistilTrainer`, before it trains.
        base: the student below its adapter.
        write_to: file that the result goes to.

    Raises:
        TrainingError: the stage does not fit the card.
    """
    if trainer.args.device.type != "cuda" or work.stage.trainer.fsdp != "none":
        return None
    lengths = np.minimum(np.asarray(work.caches.num_tokens), work.plan.limit)
    packs = longest_batch(work.plan.num_packs, lambda i: int(lengths[work.plan.rows_of(i)].sum()), work.stage.trainer)
    batch = collate([trainer.train_dataset[i] for i in packs])
    trainer.prepare_terms()
    measure = _of_all(lambda recomputes: measured_pass(trainer, base, batch, recomputes=recomputes))
    shape = shape_of(base.config, trust_remote_code=work.student.trust_remote_code)
    memory = _least(_device_memory(trainer.args.device.index or 0), trainer.args.device)
    hidden = None if work.hidden is None else work.hidden.identity
    context = StepContext(num_processes(), work.stage.losses, hidden, work.stage.max_length)
    first = check_first_step(work.stage, work.student, shape, memory, measure, context)
    if write_to is not None:
        write_atomic(write_to, json.dumps(asdict(first), indent=1).encode(), what="memory")
    return first


def _device_memory(index: int) -> DeviceMemory:
    """Return what tensors of this process may take of a GPU now."""
    free, card = torch.cuda.mem_get_info(index)
    held = torch.cuda.memory_reserved(index)
    allowed = int(card * torch.cuda.get_per_process_memory_fraction(index))
    return DeviceMemory(min(free + held, allowed), min(card, allowed))


def _least(memory: DeviceMemory, device: torch.device) -> DeviceMemory:
    """Return the least of all processes, so that all decide alike."""
    if num_processes() == 1:
        return memory
    values = torch.tensor([memory.free_bytes, memory.card_bytes], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MIN)
    return DeviceMemory(*values.tolist())


def longest_batch(num_packs: int, tokens_of: Callable[[int], int], trainer: StageTrainer) -> Sequence[int]:
    """Return the packs of the forward pass that has most tokens, among the first few thousand."""
    size = min(trainer.per_device_train_batch_size, num_packs)
    tokens = [tokens_of(i) for i in range(min(num_packs, max(MOST_PACKS_LOOKED_AT, size)))]
    starts = range(0, len(tokens) - size + 1, size)
    start = max(starts, key=lambda first: sum(tokens[first : first + size]))
    return range(start, start + size)


def measured_pass(trainer: Any, base: Any, batch: dict[str, Any], *, recomputes: bool) -> int | None:
    """Run one forward and backward pass and return the most bytes of tensors on the GPU; None where they did not fit.

    Turns recomputation on for good where `recomputes`. Leaves no gradient, no recorded value and the random state as it
    was.
    """
    model, device = trainer.model, trainer.args.device
    if recomputes:
        trainer.recompute_activations(base)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.random.fork_rng([device]):
            inputs = trainer._prepare_inputs(dict(batch))
            with trainer.accelerator.autocast():
                loss = model(**inputs, num_items_in_batch=inputs["labels"].numel()).loss
            loss.backward()
        return int(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
        trainer.forget_measured()
        torch.cuda.empty_cache()


def _of_all(measure: Measure) -> Measure:
    """Return a measure that is the largest of all processes', so that all decide alike."""
    if num_processes() == 1:
        return measure

    def largest(recomputes: bool) -> int | None:
        mine = measure(recomputes)
        value = torch.tensor(float("inf") if mine is None else float(mine), dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return None if torch.isinf(value) else int(value)

    return largest

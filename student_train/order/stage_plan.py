"""All packs of one stage: as many epochs of `order` as its steps need, and one hash for them.

A stage's order depends on the seed and the data and never on the stage's name or losses, so that two stages with the
same trainer arguments see the same packs at the same steps. Cost: that of planning the epochs; 4 bytes per row and
epoch afterwards.

Shape letters: R rows in the caches, P packs in an epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.recipe.recipe import StageTrainer
from student_train.order.order import EpochPlan, StageRows, plan_epoch
from student_train.order.round_order import RoundPlanner


@dataclass(frozen=True, eq=False)
class StagePlan:
    """The packs of one stage in training order."""

    epochs: Sequence[EpochPlan]
    """Or rounds, where the mixture changes."""
    num_packs: int
    """Packs that are trained on; the last epoch may hold more."""
    packs_per_step: int
    """Packs of all devices in one optimizer step."""
    limit: int
    """Longest row in tokens; a longer one is cut here."""
    seed: int
    packs_per_epoch: int | None = None
    """Packs that hold every row once, where the stage is planned in rounds."""

    @classmethod
    def begun(cls, trainer: StageTrainer, planner: RoundPlanner, num_devices: int = 1, /, **of_class: Any) -> Self:
        """Return the plan of a stage none of whose rounds is planned yet; `of_class`: fields of a class below."""
        per_step = packs_in_step(trainer, num_devices)
        wanted = math.ceil(trainer.num_train_epochs * planner.packs_per_epoch)
        return cls(
            epochs=[],
            num_packs=wanted if trainer.max_steps is None else trainer.max_steps * per_step,
            packs_per_step=per_step,
            limit=planner.rows.limit,
            seed=planner.rows.seed,
            packs_per_epoch=planner.packs_per_epoch,
            **of_class,
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.num_packs / self.packs_per_step)

    def packs_between(self, first_step: int, end_step: int) -> int:
        """Return how many packs the steps from one to before another have."""
        return min(end_step * self.packs_per_step, self.num_packs) - first_step * self.packs_per_step

    @cached_property
    def hash(self) -> str:
        """Hex xxh3-128 of every pack, in order, and of how they form steps."""
        digest = xxhash.xxh3_128(
            f"{self.num_packs} {self.num_steps} {self.packs_per_step} {self.limit} {self.seed}".encode()
        )
        for epoch in self.epochs:
            digest.update(epoch.hash.encode())
        return digest.hexdigest()

    @cached_property
    def _known_ends(self) -> list[int]:
        return []

    @property
    def _ends(self) -> list[int]:
        if len(self._known_ends) != len(self.epochs):
            self._known_ends[:] = accumulate(epoch.num_packs for epoch in self.epochs)
        return self._known_ends

    def rows_of(self, index: int) -> NDArray[np.int32]:
        """Return the row indices of the stage's pack `index`."""
        epoch, pack = self.place_of(index)
        return self.epochs[epoch].pack(pack)

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the epoch, or round, of the stage's pack `index`, and the pack's number in it."""
        if not 0 <= index < self.num_packs:
            raise IndexError(f"pack {index} of {self.num_packs}")
        epoch = bisect_right(self._ends, index)
        assert epoch < len(self.epochs), f"pack {index} is read before its round is planned"
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

    def epoch_at(self, num_steps: int) -> float:
        """Return how many epochs `num_steps` steps cover."""
        done = min(num_steps * self.packs_per_step, self.num_packs)
        if self.packs_per_epoch is not None:
            return done / self.packs_per_epoch
        epoch = min(bisect_right(self._ends, done), len(self.epochs) - 1)
        before = self._ends[epoch - 1] if epoch else 0
        return epoch + (done - before) / self.epochs[epoch].num_packs

    @property
    def is_complete(self) -> bool:
        """Say whether every pack is known already."""
        return True

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens, over all epochs."""
        if not self.epochs:
            return 0.0
        room = sum(epoch.num_tokens / epoch.fill for epoch in self.epochs)
        return sum(epoch.num_tokens for epoch in self.epochs) / room


def packs_in_step(trainer: StageTrainer, num_devices: int) -> int:
    """Return how many packs an optimizer step takes on all devices together."""
    return trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * num_devices


def plan_stage(
    trainer: StageTrainer, rows: StageRows, mixture: Mapping[int, float] | None, num_devices: int = 1
) -> StagePlan:
    """Plan as many epochs as `max_steps` or `num_train_epochs` of the stage needs.

    Args:
        trainer: the stage's arguments.
        rows: what is drawn from.
        mixture: share per source code, or None.
        num_devices: processes that train together.

    Raises:
        TrainingError: nothing is left to train on, or a row is too long and must not be.
    """
    per_step = packs_in_step(trainer, num_devices)
    wanted_packs = None if trainer.max_steps is None else trainer.max_steps * per_step
    epochs: list[EpochPlan] = []
    num_packs = 0
    while num_packs < wanted_packs if wanted_packs is not None else len(epochs) < trainer.num_train_epochs:
        epoch = plan_epoch(rows, len(epochs), mixture)
        part = 1.0 if wanted_packs is not None else min(1.0, trainer.num_train_epochs - len(epochs))
        num_packs += math.ceil(part * epoch.num_packs)
        epochs.append(epoch)
    num_packs = num_packs if wanted_packs is None else wanted_packs
    return StagePlan(tuple(epochs), num_packs, per_step, rows.limit, rows.seed)

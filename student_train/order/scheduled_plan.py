"""The packs of a stage whose mixture moves: by a schedule, planned at once, or by its evaluations, planned round by
round.

By a schedule: shares are constant within a round, which is as long as 1/64 of the stage or what fills packs well, and
ends wherever a stepwise share changes. By evaluations: round k begins one step after evaluation k, since the first
packs of the step that follows an evaluation are read before it is made. Cost: see round_order.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import xxhash

from shared.recipe.recipe import Schedule, StageTrainer
from student_train.order import schedules
from student_train.order.order import EpochPlan
from student_train.order.round_order import RoundPlanner
from student_train.order.schedules import RunSteps
from student_train.order.stage_plan import StagePlan

_ROUNDS = 64
"""Rounds of a scheduled stage, at least, where it has as many steps."""
_MOST_ROUNDS = 1024
"""And at most, where no share moves in steps: each plans its packs apart."""
_ROUND_PACKS = 16
"""Packs of a round, where that leaves `_ROUNDS` of them: enough to fill them well."""
READ_AHEAD_STEPS = 1
"""Steps whose packs are read before the step before them is done."""


def shares_at(mixture: Mapping[int, Schedule], step: int, num_steps: int, run: RunSteps | None) -> dict[int, float]:
    """Return the share of each source at an optimizer step, counted from 0, scaled to sum to 1 (all 0
    where they are).
    """
    shares = {code: schedules.value(share, step, num_steps, run) for code, share in mixture.items()}
    total = sum(shares.values())
    return {code: share / total if total else 0.0 for code, share in shares.items()}


def plan_scheduled(
    trainer: StageTrainer,
    planner: RoundPlanner,
    mixture: Mapping[int, Schedule],
    run: RunSteps | None,
    num_devices: int = 1,
) -> StagePlan:
    """Plan all rounds of a stage whose shares follow schedules.

    Raises:
        TrainingError: every share is 0 at some step.
    """
    plan = StagePlan.begun(trainer, planner, num_devices)
    rounds: list[EpochPlan] = []
    starts = _round_starts(plan, mixture, run)
    for start, end in zip(starts, [*starts[1:], plan.num_steps], strict=True):
        by_step = [shares_at(mixture, step, plan.num_steps, run) for step in range(start, end)]
        shares = {code: math.fsum(shares[code] for shares in by_step) / len(by_step) for code in mixture}
        rounds.append(planner.next_round(shares, plan.packs_between(start, end)))
    return replace(plan, epochs=tuple(rounds))


def _round_starts(plan: StagePlan, mixture: Mapping[int, Schedule], run: RunSteps | None) -> list[int]:
    """Return the first step of each round."""
    num_steps = plan.num_steps
    length = min(-(-_ROUND_PACKS // plan.packs_per_step), num_steps // _ROUNDS)
    length = max(length, num_steps // _MOST_ROUNDS, 1)
    starts = set(range(0, num_steps, length))
    for share in mixture.values():
        if share.kind == "step":
            values = [schedules.value(share, step, num_steps, run) for step in range(num_steps)]
            starts |= {step for step in range(1, num_steps) if values[step] != values[step - 1]}
    return sorted(starts)


@dataclass(frozen=True, eq=False, kw_only=True)
class GrowingPlan(StagePlan):
    """A plan whose rounds become known while the stage trains."""

    epochs: list[EpochPlan]
    planner: RoundPlanner
    every_steps: int
    """Steps between rounds."""
    settings: str
    """What the shares depend on beside the evaluations."""

    @cached_property
    def hash(self) -> str:
        """Hex xxh3-128 of everything that the rounds depend on beside the evaluations."""
        size = f"{self.num_packs} {self.num_steps} {self.packs_per_step} {self.limit} {self.seed} {self.every_steps}"
        return xxhash.xxh3_128_hexdigest(f"{size} {self.planner.hash} {self.settings}".encode())

    @property
    def is_complete(self) -> bool:
        """Say whether every round is planned."""
        return self._first_step(len(self.epochs)) >= self.num_steps

    def add_round(self, shares: Mapping[int, float]) -> None:
        """Plan the next round with a share per source code."""
        start, end = (self._first_step(len(self.epochs) + more) for more in (0, 1))
        self.epochs.append(self.planner.next_round(shares, self.packs_between(start, min(end, self.num_steps))))

    def _first_step(self, round_: int) -> int:
        return round_ * self.every_steps + READ_AHEAD_STEPS if round_ else 0

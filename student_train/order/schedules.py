"""The value of a weight or a temperature at an optimizer step: a pure function, so that a resumed run sees the same
values.

The first step has progress 0 and the last one progress 1; a stage of one step stays at its start. Over a run, the first
step of the recipe's first stage has progress 0 and the last step of its last stage progress 1, whichever stages are
trained now.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.recipe.schedule import Schedule


@dataclass(frozen=True, slots=True)
class RunSteps:
    """Where a stage lies in its run."""

    before: int
    """Optimizer steps of the stages before it."""
    total: int
    """Optimizer steps of all stages."""


def value(schedule: Schedule | float, step: int, total_steps: int, run: RunSteps | None = None) -> float:
    """Return a schedule's value at optimizer step `step`, counted from 0, of `total_steps`; beyond the last step, the
    last value.

    Raises:
        ValueError: the step is negative, there are no steps, or it goes over the run and no `run` is given.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}: steps count from 0 and there must be at least one")
    if not isinstance(schedule, Schedule):
        return float(schedule)
    if schedule.over == "run":
        if run is None:
            raise ValueError("a schedule over the run needs the steps of all stages")
        step, total_steps = run.before + min(step, total_steps - 1), run.total
    return schedule.value(min(step, total_steps - 1) / max(total_steps - 1, 1))

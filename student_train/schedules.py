"""The value of a weight or a temperature at an optimizer step: a pure function, so that a resumed run sees the same values.

The first step has progress 0 and the last one progress 1; a stage of one step stays at its start.
"""

from __future__ import annotations

from shared.recipe_schedule import Schedule


def value(schedule: Schedule | float, step: int, total_steps: int) -> float:
    """Return a schedule's value at optimizer step `step`, counted from 0, of `total_steps`; beyond the last step, the last value.

    Raises:
        ValueError: the step is negative or there are no steps.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}: steps count from 0 and there must be at least one")
    if not isinstance(schedule, Schedule):
        return float(schedule)
    return schedule.value(min(step, total_steps - 1) / max(total_steps - 1, 1))

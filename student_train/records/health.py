"""Is a training run sound? A falling loss proves nothing, so say what was checked.

Checks: every planned step done, every loss finite, gradient norms present, finite and bounded, the training did not
    stop itself,
final model and checkpoints saved.
Cost: one pass over the step log.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

GRAD_NORM_BOUND = 100.0
"""Largest gradient norm, over the median norm, that is called bounded."""


def health_of(
    steps: Sequence[Mapping[str, Any]],
    num_steps_planned: int,
    *,
    model_saved: bool,
    checkpoint_steps: Sequence[int],
    logging_steps: int = 1,
    stopped: str | None = None,
) -> dict[str, Any]:
    """Return what health.json says.

    Args:
        steps: records of metrics.jsonl, oldest first.
        num_steps_planned: optimizer steps of the whole stage.
        model_saved: whether the final model is on disk.
        checkpoint_steps: steps of the complete checkpoints that are kept.
        logging_steps: steps between records.
        stopped: why the training stopped itself, where it did.
    """
    losses = [record["loss"] for record in steps]
    norms = [record["grad_norm"] for record in steps]
    finite_norms = [norm for norm in norms if _is_finite(norm)]
    median = statistics.median(finite_norms) if finite_norms else None
    largest = max(finite_norms) if finite_norms else None
    steps_done = steps[-1]["step"] if steps else 0
    expected = set(range(logging_steps, num_steps_planned + 1, logging_steps)) | {num_steps_planned}
    checks = {
        "all_steps_done": steps_done == num_steps_planned,
        "every_step_logged": [record["step"] for record in steps] == sorted(expected),
        "losses_finite": bool(losses) and all(_is_finite(loss) for loss in losses),
        "grad_norms_finite": bool(norms) and len(finite_norms) == len(norms),
        "not_diverged": stopped is None,
        "grad_norms_bounded": largest is not None
        and median is not None
        and largest <= GRAD_NORM_BOUND * max(median, 1e-12),
        "model_saved": model_saved,
        "checkpoints_saved": bool(checkpoint_steps),
    }
    return {
        "healthy": all(checks.values()),
        "checks": checks,
        **({} if stopped is None else {"stopped": stopped}),
        "steps_done": steps_done,
        "steps_planned": num_steps_planned,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "grad_norm_median": median,
        "grad_norm_max": largest,
        "checkpoints": list(checkpoint_steps),
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

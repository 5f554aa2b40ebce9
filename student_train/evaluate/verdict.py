"""What a stage's evaluations so far say: which step is the best, and whether it is time to stop. A pure function of
them.

So nothing of it needs to be stored: a resumed stage reads its evaluations again and decides as the unbroken one would.
The evaluation before the first step takes no part: no checkpoint holds those weights. Cost: one pass over the
evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.recipe.recipe import EarlyStopping


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evaluations up to now say."""

    best_step: int | None = None
    """Step of the lowest held-out KL, the earliest of equals; None before the first."""
    best_kl_nats: float | None = None
    num_stale: int = 0
    """Evaluations in a row, the last one included, that were not better than the best before them by `min_delta_nats`.
    """
    stopped_at: int | None = None
    """Step of the last evaluation, where the patience is used up by then."""

    @property
    def stops(self) -> bool:
        """Say whether the patience is used up."""
        return self.stopped_at is not None


def judge(evaluations: Sequence[Mapping[str, Any]], early_stopping: EarlyStopping | None) -> Verdict:
    """Return the verdict on evaluations, each with `step` and `kl_nats` (None where it is not finite), oldest first."""
    best_step, best, reference, num_stale = None, float("inf"), float("inf"), 0
    min_delta = early_stopping.min_delta_nats if early_stopping else 0.0
    for evaluation in evaluations:
        if evaluation["step"] == 0:
            continue
        kl = float("inf") if evaluation["kl_nats"] is None else evaluation["kl_nats"]
        if kl < best:
            best_step, best = evaluation["step"], kl
        is_better = kl < reference - min_delta
        num_stale = 0 if is_better else num_stale + 1
        reference = kl if is_better else reference
    stops = early_stopping is not None and num_stale >= early_stopping.patience
    return Verdict(
        best_step, None if best_step is None else best, num_stale, evaluations[-1]["step"] if stops else None
    )

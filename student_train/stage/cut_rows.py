"""Which rows of a stage are cut before the first token that is trained, so that nothing of them is learned?

Cost: one read of each row that is cut, without its targets; none of a cache that is read from a URL.
"""

from __future__ import annotations

import numpy as np

from shared.errors import TrainingError
from shared.recipe.recipe import Stage
from student_train.batch.dataset import CacheList
from student_train.order.stage_plan import StagePlan


def rows_without_labels(stage: Stage, plan: StagePlan, caches: CacheList) -> int:
    """Return how many of a stage's rows are cut before the first token that is trained.

    Raises:
        TrainingError: all are, so that the stage would train on nothing.
    """
    if caches.is_remote or not any(epoch.num_cut for epoch in plan.epochs):
        return 0
    drawn = np.unique(np.concatenate([epoch.rows for epoch in plan.epochs]))
    cut = drawn[caches.num_tokens[drawn] > plan.limit]
    lost = sum(caches.sequence(int(row)).spans[:1, 0].min(initial=plan.limit) >= plan.limit for row in cut)
    if lost == len(drawn):
        raise TrainingError(
            f"stage '{stage.name}' has nothing to train on: all of its {lost:,} rows are cut to {plan.limit:,} tokens, "
            "before the first that is trained; raise trainer.pack_tokens and max_length as far as the student's "
            "positions go, or name other rows"
        )
    return int(lost)

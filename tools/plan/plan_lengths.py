"""Which rows a stage would cut or leave out: those above its pack, its `max_length` or its student's positions.

Cost: the student's config where it is a directory, and the lengths of the caches' rows (their offsets, no sequence).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.recipe.recipe import Recipe, Stage
from tools.plan.plan_existing import caches_there


def row_lengths(recipe: Recipe) -> NDArray[np.integer[Any]]:
    """Return [R] tokens of the rows of a recipe's caches.

    Raises:
        CacheError: a cache cannot be read.
    """
    lengths = [Cache.open_sequences(path).num_tokens for path in caches_there(recipe)]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int32)


def length_figures(
    recipe: Recipe, stage: Stage, lengths: NDArray[np.integer[Any]], longest_to_come: int
) -> dict[str, Any]:
    """Return a stage's `limit` in tokens, where it comes from, and the rows above it.

    `lengths` are [R] tokens of the rows that are there, `longest_to_come` those of the longest to be added, or 0.
    """
    from student_train.order.order import length_limit
    from student_train.stage.student_length import student_positions

    packs, student = length_limit(stage.trainer.pack_tokens, stage.max_length), recipe.student
    known = student_positions(student) if student is not None and Path(student.model).is_dir() else None
    limit = packs if known is None else min(packs, known)
    by = "the positions that the student knows" if limit < packs else "max_length" if stage.max_length else "a pack"
    return {
        "limit": limit,
        "limited_by": by,
        "too_long": stage.too_long,
        "rows_above": int((lengths > limit).sum()),
        "longest_to_come": longest_to_come,
    }


def length_line(name: str, figures: dict[str, Any]) -> str | None:
    """Say which rows of a stage are cut, dropped or refused; None where all are trained on whole."""
    there, coming = figures["rows_above"], figures["longest_to_come"]
    found = [f"{there:,} rows of the cache"] if there else []
    found += [f"rows to come, of up to {coming:,} tokens,"] if coming > figures["limit"] else []
    if not found:
        return None
    done = {"cut": "are cut there", "drop": "are dropped", "refuse": "are refused"}[figures["too_long"]]
    limit = f"{figures['limit']:,} tokens ({figures['limited_by']})"
    return f"  train {name}: {' and '.join(found)} above {limit} {done}"

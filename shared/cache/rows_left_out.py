"""Which rows of a recipe's caches a training, and what measures it, leave out: repeats, and rows made otherwise.

Repeats: of equal row_keys in several caches the first counts, as `decant cache merge` has it. Others: with `answers:
matching` a row counts only where the job that made it drew, answered and rendered as the recipe does
(made_otherwise.py).
Cost: the row_key columns where there are several caches; one small header per job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.cache.made_otherwise import made_otherwise
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe


class LeftOut(NamedTuple):
    """Which of the R rows of caches, one after another, are left out."""

    repeats: NDArray[np.bool_]
    """[R] rows whose row_key a row of an earlier cache has."""
    other_answers: NDArray[np.bool_]
    """[R] rows besides that were drawn, answered or rendered otherwise than the recipe says."""
    all_are_other: bool
    """No row was made as the recipe says, so that all count."""

    @property
    def rows(self) -> NDArray[np.bool_]:
        """[R] all rows that are left out."""
        return self.repeats | self.other_answers


def rows_left_out(caches: Sequence[Cache], recipe: Recipe | None) -> LeftOut:
    """Return which rows of caches are left out: repeats, and answers that a recipe's `answers` does not choose.

    Training rows and held-out rows follow the same rule; where no row was made as the recipe says, all count.
    """
    repeats = repeated_in(caches)
    if recipe is None or not len(repeats):
        return LeftOut(repeats, np.zeros(len(repeats), np.bool_), False)
    other = np.concatenate([other_answers(recipe, cache) for cache in caches]) & ~repeats
    all_are_other = bool((other | repeats).all())
    return LeftOut(repeats, other & (not all_are_other), all_are_other)


def repeated_in(caches: Sequence[Cache]) -> NDArray[np.bool_]:
    """Return [R] which rows of caches, one after another, have the row_key of a row of an earlier cache."""
    repeats = np.zeros(sum(len(cache) for cache in caches), np.bool_)
    if len(caches) > 1:
        keys = np.concatenate([cache.row_keys for cache in caches])
        repeats[:] = True
        repeats[np.unique(keys.view("S16"), return_index=True)[1]] = False
    return repeats


def other_answers(recipe: Recipe, cache: Cache) -> NDArray[np.bool_]:
    """Return [R] which rows of a cache were made otherwise than a recipe with prompts says."""
    other, jobs = np.zeros(len(cache), np.bool_), made_otherwise(recipe, cache.path)
    for id8, start, end in cache.jobs_of_rows() if jobs else ():
        labels = jobs.get(id8, frozenset())
        names = cache.source_names if labels is None else [name for name in cache.source_names if name in labels]
        other[start:end] = np.isin(cache.sources[start:end], [cache.source_names.index(name) for name in names])
    return other


def answers_line(recipe: Recipe) -> str | None:
    """Say before any work how many rows of a recipe's cache were made otherwise; None where none was."""
    path = recipe.cache[0]
    if not (path / "cache.json").is_file():
        return None
    jobs, rows = made_otherwise(recipe, path), 0
    for record in list_records(sequences_dir(path)) if jobs else ():
        labels = jobs.get(record.id8, frozenset())
        sources = record.stats["sources"]
        rows += sum(sources[name]["rows"] for name in sources if labels is None or name in labels)
    if not rows:
        return None
    return (
        f"{path} holds {rows:,} rows that were drawn or rendered otherwise than the recipe says; training and "
        "evaluation leave them out once others are there, `answers: all` takes both"
    )

"""Which rows of a recipe's caches a training, and what measures it, leave out: repeats, and answers drawn otherwise.

Repeats: of equal row_keys in several caches the first counts, as `decant cache merge` has it. Other answers: a recipe
with prompts whose `generate` was changed builds new rows beside the old ones; with `answers: matching` a row counts
only where the job that made it drew as the recipe does. Rows without a job here (merged, imported) and a student's own
answers, which are drawn as `rounds` says, always count.
Cost: the row_key columns where there are several caches; one small header per job.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.parts.jobs import list_jobs
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe
from shared.recipe.sections.generate import Generate

_DRAWN_BY = ("temperature", "top_p", "top_k", "stop", "max_new_tokens", "seed")
"""What of `generate` makes another row of the same prompt."""


class LeftOut(NamedTuple):
    """Which of the R rows of caches, one after another, are left out."""

    repeats: NDArray[np.bool_]
    """[R] rows whose row_key a row of an earlier cache has."""
    other_answers: NDArray[np.bool_]
    """[R] rows besides whose answers were drawn otherwise than the recipe says."""
    all_are_other: bool
    """No row was drawn as the recipe says, so that all count."""

    @property
    def rows(self) -> NDArray[np.bool_]:
        """[R] all rows that are left out."""
        return self.repeats | self.other_answers


def rows_left_out(caches: Sequence[Cache], recipe: Recipe | None) -> LeftOut:
    """Return which rows of caches are left out: repeats, and answers that a recipe's `answers` does not choose.

    Training rows and held-out rows follow the same rule; where no row was drawn as the recipe says, all count.
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
    """Return [R] which rows of a cache were answered with other settings than a recipe with prompts says."""
    other, jobs = np.zeros(len(cache), np.bool_), _other_jobs(recipe, cache.path)
    for id8, start, end in cache.jobs_of_rows():
        other[start:end] = id8 in jobs
    return other


def answers_line(recipe: Recipe) -> str | None:
    """Say before any work how many rows of a recipe's cache were answered with other settings; None where none was."""
    path = recipe.cache[0]
    if not (path / "cache.json").is_file():
        return None
    jobs = _other_jobs(recipe, path)
    rows = sum(record.rows for record in list_records(sequences_dir(path)) if record.id8 in jobs)
    if not rows:
        return None
    return (
        f"{path} holds {rows:,} rows whose answers were drawn otherwise than `generate` says; training and evaluation "
        "leave them out once others are there, `answers: all` takes both"
    )


def _other_jobs(recipe: Recipe, path: Path) -> set[str]:
    """Return the first 8 digits of the jobs of a cache that drew answers otherwise than a recipe with prompts says."""
    if not recipe.prompts or recipe.answers == "all":
        return set()
    wanted = None if recipe.generate is None else _drawn(recipe.generate.model_dump(mode="json"), recipe.seed)
    return {job.id8 for job in list_jobs(path) if "round" not in job.request and _asked(job.request) != wanted}


def _asked(request: dict[str, Any]) -> dict[str, Any] | None:
    found = request.get("generate")
    return _drawn(found, 0) if isinstance(found, dict) else None


def _drawn(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return how answers are drawn, what is left out at its default."""
    defaults = Generate().model_dump(mode="json") | {"seed": seed}
    return {name: defaults[name] if settings.get(name) is None else settings[name] for name in _DRAWN_BY}

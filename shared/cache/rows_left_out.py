"""Which rows of a recipe's caches a training, and what measures it, leave out: repeats, and rows made otherwise.

Repeats: of equal row_keys in several caches the first counts, as `decant cache merge` has it. Others: with `answers:
matching` a row counts only where the job that made it drew, answered and rendered as the recipe does. A recipe with
prompts whose `generate` was changed, or the template settings of a source, builds new rows beside the old ones. What
made a row stands in the request of its job: how answers were drawn, which model drew them, and for every source how
turns became tokens. A student's own answers are drawn as `rounds` says and are never others; nor are rows without a job
(merged, imported) and sources that the recipe does not name. Which model answers is looked at only where several did.
Cost: the row_key columns where there are several caches; one small header per job; samples of the answering model's
weights where several models answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.layout import list_layers, sequences_dir
from shared.cache.rendering import rendering_of, source_of_job
from shared.errors import ModelError, PromptError
from shared.identity.weights_hash import weights_hash
from shared.parts.jobs import Job, list_jobs
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe
from shared.recipe.sections.generate import Generate

Others = dict[str, frozenset[str] | None]
"""First 8 digits of a job to the sources whose rows are others; None where all of them are."""


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


def made_otherwise(recipe: Recipe, path: Path) -> Others:
    """Return the jobs of a cache with rows that were made otherwise than a recipe with prompts says.

    Raises:
        DamagedError: a job's request says what does not fit.
    """
    if not recipe.prompts or recipe.answers == "all":
        return {}
    wanted = None if recipe.generate is None else _drawn(recipe.generate.model_dump(mode="json"), recipe.seed)
    jobs = [job for job in list_jobs(path) if "round" not in job.request]
    drawn = [job for job in jobs if _asked(job.request) == wanted]
    answerer = _answerer(recipe, path, drawn)
    found: Others = {job.id8: None for job in jobs if job not in drawn}
    for job in drawn:
        if answerer is not None and _generator(job.request) not in (None, answerer):
            found[job.id8] = None
        elif labels := _rendered_otherwise(recipe, job, path):
            found[job.id8] = labels
    return found


def _asked(request: Mapping[str, Any]) -> dict[str, Any] | None:
    found = request.get("generate")
    return _drawn(found, 0) if isinstance(found, dict) else None


def _drawn(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return how answers are drawn, what is left out at its default."""
    defaults = Generate().model_dump(mode="json") | {"seed": seed}
    drawn_by = defaults.keys() - Generate.DRAWS_NO_OTHER
    return {name: defaults[name] if settings.get(name) is None else settings[name] for name in drawn_by}


def _generator(request: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return (hash of the weights, of the adapter) of the model that answered; None where a request does not say."""
    found = request.get("generator")
    if not isinstance(found, dict) or not isinstance(found.get("weights"), str):
        return None
    return found["weights"], found.get("adapter")


def _answerer(recipe: Recipe, path: Path, jobs: Sequence[Job]) -> tuple[str, str | None] | None:
    """Return what the recipe's answering model is in requests; None where one model answered, or it is not known here.

    A machine that only trains may lack the teacher: the cache's layers then say what its weights are.
    """
    teacher, generate = recipe.teacher, recipe.generate
    if teacher is None or generate is None or len({_generator(job.request) for job in jobs} - {None}) < 2:
        return None
    name, adapter = (teacher.model, teacher.adapter) if generate.model is None else (generate.model, None)
    try:
        own = weights_hash(Path(name).expanduser())
        return own, None if adapter is None else weights_hash(Path(adapter).expanduser())
    except ModelError:
        layers = [layer.identity for layer in list_layers(path).values()] if generate.model is None else []
        known = {(layer.weights_hash, layer.adapter) for layer in layers if layer.teacher == name}
        return known.pop() if len(known) == 1 else None


def _rendered_otherwise(recipe: Recipe, job: Job, path: Path) -> frozenset[str]:
    """Return the sources that a job rendered otherwise than each entry of the recipe with that label does."""
    entries = job.request.get("prompts") or ()
    wanted: dict[str, list[str]] = {}
    with suppress(PromptError):  # a template file that is not here: its sources are not compared
        for source in recipe.prompts:
            if not source.of_cache:
                wanted.setdefault(source.source, []).append(_spelled(rendering_of(source), job))
    found = {source.source: set[str]() for source in recipe.prompts}
    for origin, entry in enumerate(entries):
        label = entry.get("source")
        if entry.get("format") != "cache" and label in wanted:
            found[label].add(_spelled(rendering_of(source_of_job(job, origin, path)), job))
    return frozenset(label for label, had in found.items() if had and had.isdisjoint(wanted.get(label, ())))


def _spelled(rendering: Mapping[str, Any], job: Job) -> str:
    """Return settings as text; which given answers are trained is none of answers that are drawn."""
    less = {"supervise"} if job.request.get("generate") else set[str]()
    return json.dumps({name: value for name, value in rendering.items() if name not in less}, sort_keys=True)

"""Which rows of a cache were made otherwise than a recipe says: by other settings, another model, another rendering.

A recipe with prompts whose `generate` was changed, or the template settings of a source, builds new rows beside the old
ones. What made a row stands in the request of its job: how answers were drawn, which model drew them, and for every
source how turns became tokens. A student's own answers are drawn as `rounds` says and are never others; nor are rows
without a job (merged, imported) and sources that the recipe does not name. Which model answers is looked at only where
several did.
Cost: one small header per job; samples of the answering model's weights where several models answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.cache.layout import list_layers
from shared.cache.rendering import rendering_of, source_of_job
from shared.errors import ModelError, PromptError
from shared.identity.weights_hash import weights_hash
from shared.parts.jobs import Job, list_jobs
from shared.recipe.recipe import Recipe
from shared.recipe.sections.generate import Generate

_DRAWN_BY = ("temperature", "top_p", "top_k", "stop", "max_new_tokens", "seed")
"""What of `generate` makes another row of the same prompt."""

Others = dict[str, frozenset[str] | None]
"""First 8 digits of a job to the sources whose rows are others; None where all of them are."""


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
    return {name: defaults[name] if settings.get(name) is None else settings[name] for name in _DRAWN_BY}


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

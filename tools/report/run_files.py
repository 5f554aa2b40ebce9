"""What a run left on disk, read without failing: what is absent or unreadable becomes a sentence of the report.

Only files of the run directory and the caches' records are read; no model is loaded. Files are untrusted: sizes are
bounded and whatever is not of the expected shape counts as missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shared.cache.cache import Cache
from shared.errors import DecantError, NamingError
from shared.parts.part_stats import add_figures
from shared.places import named
from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe
from tools.evaluate.results.results import heldout_layer
from tools.evaluate.results.run_shapes import (
    MAX_FILE_BYTES,
    AnswerRow,
    Audit,
    Cost,
    Distances,
    Evaluation,
    Harness,
    Health,
    HeldoutStep,
    Seconds,
    SideRow,
    Step,
    Timing,
    is_finite,
    read_lines,
    read_object,
)
from tools.evaluate.side_by_side.side_figures import Answers, by_temperature
from tools.evaluate.tasks.contamination import among_caches, by_task

MEANS = ("bytes_per_position", "entropy_bin_nats", "share_with_head", "placed_mass", "teacher_mass")
"""Figures of a cache that are means over its positions, besides those that are called so."""


WHOLE = ("all_steps_done", "losses_finite", "not_diverged", "model_saved")
"""Checks of a stage without which it is not what its recipe asks for."""


@dataclass(frozen=True, slots=True)
class StageFiles:
    """What one training stage left."""

    steps: list[dict[str, Any]]
    """Records of metrics.jsonl, oldest first, each term beside the loss."""
    terms: list[str]
    """Names of the loss terms."""
    health: dict[str, Any] | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Records of evaluations.jsonl, oldest first."""
    tokens_per_second: float | None = None
    """Median over the steps."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What one run left."""

    directory: Path
    name: str
    recipe: Recipe | None
    recipe_text: str
    stages: dict[str, StageFiles]
    evaluations: dict[str, dict[str, Any]]
    """Model -> its evaluation, in the recipe's order."""
    answers: dict[str, list[dict[str, Any]]]
    """Model -> its answers to the questions of tasks; only those that have some."""
    side_answers: dict[str, Answers]
    """Model -> its sampled answers, by temperature."""
    cost: dict[str, Any]
    """Model -> its cost figures; empty where they were not measured."""
    lm_eval: dict[str, dict[str, Any]]
    """Model -> TASK -> METRIC -> value and stderr, of lm-evaluation-harness."""
    audit: dict[str, Any]
    """What `decant cache audit --recipe` found; empty where it was not asked."""
    distances: dict[str, Any]
    """How far several teachers are from one another; empty where there is one."""
    seconds: dict[str, float]
    cache: dict[str, Any]
    """Statistics of the caches, summed; empty where none could be read."""
    layers: list[dict[str, Any]]
    """Identity of each cache's targets layer."""
    questions: dict[str, dict[str, int]] = field(default_factory=dict)
    """Domain -> questions of the task, and how many are also among the prompts; without tasks that cannot be read."""
    missing: list[str] = field(default_factory=list)
    """One sentence for each thing that a finished run has and this one has not."""

    def role_of(self, model: str) -> str:
        """Say whether a model of the run is a teacher, the student's start or a student."""
        further = self.recipe.teachers if self.recipe else ()
        return "teacher" if model == "teacher" or model in further else "base" if model == "base" else "student"


def read_run(directory: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        EvaluationError: it is none.
    """
    if not directory.is_dir():
        raise NamingError(f"{directory}: there is no such directory; name the output_dir of a recipe that was run")
    if not any((directory / part).exists() for part in ("recipe.yaml", "train", "evaluate", "seconds.json")):
        raise NamingError(
            f"{directory}: not a run: it has no recipe.yaml, train or evaluate; name the output_dir of a recipe that "
            "was run"
        )
    missing: list[str] = []
    recipe = _recipe(directory / "recipe.yaml", missing)
    trained = [path.name for path in sorted(directory.glob("train/*/"))]
    stage_names = [stage.name for stage in recipe.stages] if recipe else trained
    stages = {
        name: stage for name in stage_names if (stage := _stage(directory / "train" / name, name, missing)) is not None
    }
    evaluations = _evaluations(directory / "evaluate", recipe, missing)
    caches = _caches(recipe, missing)
    answers: dict[str, list[dict[str, Any]]] = {}
    side_rows: dict[str, list[dict[str, Any]]] = {}
    for name in evaluations:
        for of, folder, shape in ((answers, "evaluate", AnswerRow), (side_rows, "evaluate/side_by_side", SideRow)):
            if rows := _sound_lines(directory / folder / f"{name}.answers.jsonl", shape, f"'{name}'", missing):
                of[name] = rows
    return RunFiles(
        directory=directory,
        name=recipe.name if recipe else directory.resolve().name,
        recipe=recipe,
        recipe_text=_text(directory / "recipe.yaml"),
        stages=stages,
        evaluations=evaluations,
        answers=answers,
        side_answers={name: by_temperature(rows) for name, rows in side_rows.items()},
        cost=(_sound(directory / "evaluate" / "cost" / "figures.json", Cost, "the cost", missing) or {}).get(
            "models", {}
        ),
        lm_eval={
            name: found["tasks"]
            for name in evaluations
            if (found := _sound(directory / "evaluate" / "lm_eval" / f"{name}.json", Harness, f"'{name}'", missing))
        },
        audit=_sound(directory / "audit.json", Audit, "the audit", missing) or {},
        distances=_sound(directory / "evaluate" / "teachers" / "distances.json", Distances, "the teachers", missing)
        or {},
        seconds=_seconds(directory / "seconds.json", stage_names, missing),
        cache=_sum_stats([cache.stats() for cache in caches]) if caches else {},
        layers=[_layer(cache) for cache in caches],
        questions=by_task(recipe, lambda task: among_caches(recipe, task, caches)) if recipe and caches else {},
        missing=missing,
    )


def _recipe(path: Path, missing: list[str]) -> Recipe | None:
    if not path.is_file():
        missing.append("recipe.yaml is missing, so models and stages are those found on disk")
        return None
    try:
        return _where_it_lies(load_recipe(path), path.parent)
    except DecantError as error:
        missing.append(f"the recipe cannot be read again: {error}")
        return None


def _where_it_lies(recipe: Recipe, directory: Path) -> Recipe:
    """Return the recipe of a run that may have been moved, or be read from anywhere.

    What lay in its directory still does; another relative path is one from where the run was made, as far as the run's
    own place tells: `work/runs/demo` of a recipe with `output_dir: runs/demo` was made in `work`.
    """
    place, output = directory.resolve(), recipe.output_dir
    is_below = not output.is_absolute() and place.parts[-len(output.parts) :] == output.parts
    started = place.parents[len(output.parts) - 1] if is_below else None

    def moved(path: Path) -> Path:
        places = [directory / path.relative_to(output)] if path.is_relative_to(output) else []
        places += [started / path] if started is not None else []
        return next((other for other in places if other.exists()), path)

    return recipe.model_copy(update={"output_dir": directory, "cache": tuple(map(moved, recipe.cache))})


def _stage(directory: Path, name: str, missing: list[str]) -> StageFiles | None:
    rows = _sound_lines(directory / "metrics.jsonl", Step, f"stage '{name}'", missing)
    terms = [row.get("terms") or {} for row in rows]
    steps = [{**measured, **row} for row, measured in zip(rows, terms, strict=True)]
    health = _sound(directory / "health.json", Health, f"stage '{name}'", missing)
    if not steps:
        missing.append(f"stage '{name}' has no metrics: it was not trained")
        return None
    if health is None:
        missing.append(f"stage '{name}' has no health.json: it did not finish")
    elif failed := [check for check in WHOLE if health.get("checks", {}).get(check) is False]:
        reason = health.get("stopped") or ", ".join(f"{check.replace('_', ' ')}: no" for check in failed)
        missing.append(
            f"stage '{name}' did not train to its end ({reason}), so figures of it are of what it had reached"
        )
    evaluations = _sound_lines(directory / "evaluations.jsonl", HeldoutStep, f"stage '{name}'", missing)
    timing = _sound_lines(directory / "timing.jsonl", Timing, f"stage '{name}'", missing)
    rates = [row["tokens_per_second"] for row in timing if row.get("tokens_per_second") is not None]
    return StageFiles(steps, list(terms[-1]), health, evaluations, statistics.median(rates) if rates else None)


def _evaluations(directory: Path, recipe: Recipe | None, missing: list[str]) -> dict[str, dict[str, Any]]:
    on_disk = sorted(path.stem for path in directory.glob("*.json")) if directory.is_dir() else []
    wanted = list(recipe.evaluate.models) if recipe else []
    found = {}
    for name in [*wanted, *(name for name in on_disk if name not in wanted)]:
        result, why = read_object(directory / f"{name}.json", Evaluation)
        if result is not None:
            found[name] = result
        elif why:
            missing.append(f"the evaluation of '{name}' cannot be read: {why}; delete it and run `decant eval` again")
        else:
            missing.append(f"'{name}' was not evaluated; run `decant eval`")
    return found


def _caches(recipe: Recipe | None, missing: list[str]) -> list[Cache]:
    layer = heldout_layer(recipe) if recipe else None
    found = []
    for path in recipe.cache if recipe else ():
        try:
            found.append(Cache.open(path, layer, allow_partial=True))
        except DecantError as error:
            missing.append(f"no figures of the cache: {error}")
    return found


def _layer(cache: Cache) -> dict[str, Any]:
    return {"path": named(cache.path), "cache_id": cache.cache_id, **(cache.layer.to_json() if cache.layer else {})}


def _sum_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the figures of several caches; means are over the positions of those that have them."""
    total: dict[str, Any] = {}
    for figures in stats:
        add_figures(total, figures)
    for key in (name for name in total if name.startswith("mean_") or name in MEANS):
        known = [(figures[key], figures["positions"]) for figures in stats if key in figures]
        weighted = math.fsum(value * positions for value, positions in known)
        total[key] = weighted / max(sum(positions for _, positions in known), 1)
    return total


def _seconds(path: Path, stages: Sequence[str], missing: list[str]) -> dict[str, float]:
    """Return seconds per phase in the order in which phases run."""
    found, _ = read_object(path, Seconds)
    if found is None:
        missing.append("seconds.json is missing or cannot be read, so no phase has its time")
    order = ["teach", *(f"train.{stage}" for stage in stages)]
    given = {str(phase): value for phase, value in (found or {}).items() if is_finite(value)}
    known = {phase: float(value) for phase, value in given.items() if 0 <= value < 1e12}
    first, last = [phase for phase in order if phase in known], ("evaluate", "report")
    rest = sorted(phase for phase in known if phase not in (*order, *last))
    return {phase: known[phase] for phase in (*first, *rest, *last) if phase in known}


def _text(path: Path) -> str:
    try:
        sound = path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
        return path.read_text(encoding="utf-8", errors="replace") if sound else ""
    except OSError:
        return ""


def _sound(path: Path, shape: type[BaseModel], of: str, missing: list[str]) -> dict[str, Any] | None:
    """Return a file's object; a file that is there and not of its shape is named among what is missing."""
    value, why = read_object(path, shape)
    if why:
        missing.append(f"{of}: {path.name} is left out: {why}")
    return value


def _sound_lines(path: Path, shape: type[BaseModel], of: str, missing: list[str]) -> list[dict[str, Any]]:
    rows, faults = read_lines(path, shape)
    if faults:
        many = "one line is left out:" if len(faults) == 1 else f"{len(faults)} lines are left out, the first is"
        missing.append(f"{of}: {many} {faults[0]}")
    return rows

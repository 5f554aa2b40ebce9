"""What a run left on disk, read without failing: what is absent or unreadable becomes a sentence of the report.

Only files of the run directory and the caches' records are read; no model is loaded. Files are untrusted: sizes are
bounded and whatever is not of the expected shape counts as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.errors import DecantError, EvaluationError
from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe
from tools.evaluate.cost import COST_NUMBERS
from tools.evaluate.results import heldout_layer
from tools.evaluate.side_figures import Answers, read_side_answers

MAX_FILE_BYTES = 256 << 20


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
    answers: dict[str, Path]
    """Model -> its answers file."""
    side_answers: dict[str, Answers]
    """Model -> its sampled answers, by temperature."""
    cost: dict[str, Any]
    """Model -> its cost figures; empty where they were not measured."""
    lm_eval: dict[str, dict[str, Any]]
    """Model -> TASK -> METRIC -> value and stderr, of lm-evaluation-harness."""
    audit: dict[str, Any]
    """What `decant cache audit --recipe` found; empty where it was not asked."""
    seconds: dict[str, float]
    cache: dict[str, Any]
    """Statistics of the caches, summed; empty where none could be read."""
    layers: list[dict[str, Any]]
    """Identity of each cache's targets layer."""
    missing: list[str] = field(default_factory=list)
    """One sentence for each thing that a finished run has and this one has not."""


def read_run(directory: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        EvaluationError: it is none.
    """
    if not directory.is_dir():
        raise EvaluationError(f"{directory}: there is no such directory; name the output_dir of a recipe that was run")
    if not any((directory / part).exists() for part in ("recipe.yaml", "train", "evaluate", "seconds.json")):
        raise EvaluationError(
            f"{directory}: not a run: it has no recipe.yaml, train or evaluate; name the output_dir of a recipe that "
            "was run"
        )
    missing: list[str] = []
    recipe = _recipe(directory / "recipe.yaml", missing)
    stage_names = [stage.name for stage in recipe.stages] if recipe else _subdirectories(directory / "train")
    stages = {
        name: stage for name in stage_names if (stage := _stage(directory / "train" / name, name, missing)) is not None
    }
    evaluations = _evaluations(directory / "evaluate", recipe, missing)
    cache, layers = _caches(recipe, missing)
    return RunFiles(
        directory=directory,
        name=recipe.name if recipe else directory.resolve().name,
        recipe=recipe,
        recipe_text=_text(directory / "recipe.yaml"),
        stages=stages,
        evaluations=evaluations,
        answers={
            name: path for name in evaluations if (path := directory / "evaluate" / f"{name}.answers.jsonl").is_file()
        },
        side_answers=read_side_answers(directory, list(evaluations)),
        cost=_cost(directory / "evaluate" / "cost" / "figures.json"),
        lm_eval={
            name: found
            for name in evaluations
            if (found := _lm_eval(directory / "evaluate" / "lm_eval" / f"{name}.json"))
        },
        audit=_audit(directory / "audit.json"),
        seconds=_seconds(directory / "seconds.json", stage_names, missing),
        cache=cache,
        layers=layers,
        missing=missing,
    )


def _recipe(path: Path, missing: list[str]) -> Recipe | None:
    if not path.is_file():
        missing.append("recipe.yaml is missing, so models and stages are those found on disk")
        return None
    try:
        return load_recipe(path)
    except DecantError as error:
        missing.append(f"the recipe cannot be read again: {error}")
        return None


def _stage(directory: Path, name: str, missing: list[str]) -> StageFiles | None:
    rows = [row for row in _json_lines(directory / "metrics.jsonl") if isinstance(row.get("step"), int)]
    terms = [row["terms"] if isinstance(row.get("terms"), dict) else {} for row in rows]
    steps = [{**measured, **row} for row, measured in zip(rows, terms, strict=True)]
    health = _json(directory / "health.json")
    if not steps:
        missing.append(f"stage '{name}' has no metrics: it was not trained")
        return None
    if health is None:
        missing.append(f"stage '{name}' has no health.json: it did not finish")
    evaluations = [row for row in _json_lines(directory / "evaluations.jsonl") if isinstance(row.get("step"), int)]
    return StageFiles(steps, list(terms[-1]), health, evaluations)


def _evaluations(directory: Path, recipe: Recipe | None, missing: list[str]) -> dict[str, dict[str, Any]]:
    on_disk = sorted(path.stem for path in directory.glob("*.json")) if directory.is_dir() else []
    wanted = list(recipe.evaluate.models) if recipe else []
    found = {}
    for name in [*wanted, *(name for name in on_disk if name not in wanted)]:
        result = _json(directory / f"{name}.json")
        if result is not None and is_evaluation(result):
            found[name] = result
        elif name in on_disk:
            missing.append(f"the evaluation of '{name}' cannot be read; delete it and run `decant eval` again")
        else:
            missing.append(f"'{name}' was not evaluated; run `decant eval`")
    return found


def is_evaluation(result: Mapping[str, Any]) -> bool:
    """Tell whether a file has the shape of an evaluation: finite scores per task, finite held-out figures or null."""
    tasks, heldout = result.get("tasks"), result.get("heldout")
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        return False
    if not all(_finite(task.get(key)) for task in tasks.values() for key in ("score", "low", "high")):
        return False
    figures = ("kl_nats", "kl_low", "kl_high", "top1_agreement")
    if heldout is None:
        return True
    return (
        isinstance(heldout, dict) and all(_finite(heldout.get(key)) for key in figures) and _has_sound_details(heldout)
    )


def _has_sound_details(heldout: Mapping[str, Any]) -> bool:
    """Tell whether what an older evaluation lacks is, where it is there, of the right shape, in all and by source."""
    sources = heldout.get("by_source") or {}
    if not isinstance(sources, dict) or not all(isinstance(part, dict) for part in sources.values()):
        return False
    for part in (heldout, *sources.values()):
        numbers = [part.get(key) for key in _HELDOUT_NUMBERS]
        if not all(value is None or _finite(value) for value in numbers):
            return False
        for key in ("calibration", "agreement_by_teacher_confidence"):
            bins = part.get(key) or []
            if not isinstance(bins, list) or not all(isinstance(one, dict) for one in bins):
                return False
            if not all(_finite(one.get(column)) for one in bins for column in ("confidence", "right")):
                return False
    return True


_HELDOUT_NUMBERS = ("positions", "kl_nats", "top1_agreement", "top1_in_teacher_top5", "calibration_error", "perplexity")


def _cost(path: Path) -> dict[str, Any]:
    models = (_json(path) or {}).get("models")
    found = models if isinstance(models, dict) else {}
    return {
        name: figures
        for name, figures in found.items()
        if isinstance(figures, dict) and all(figures.get(key) is None or _finite(figures[key]) for key in COST_NUMBERS)
    }


def _lm_eval(path: Path) -> dict[str, Any]:
    tasks = (_json(path) or {}).get("tasks")
    metrics = (
        [m for t in tasks.values() for m in (t.values() if isinstance(t, dict) else [None])]
        if isinstance(tasks, dict)
        else []
    )
    sound = all(
        isinstance(m, dict) and _finite(m.get("value")) and (m.get("stderr") is None or _finite(m["stderr"]))
        for m in metrics
    )
    return tasks if isinstance(tasks, dict) and sound else {}


def _audit(path: Path) -> dict[str, Any]:
    """Return a kept audit, or nothing where its tables could not be drawn."""
    found = _json(path) or {}
    faith, truncation = found.get("faithfulness"), found.get("truncation")
    if not isinstance(faith, dict) or not isinstance(truncation, list) or not isinstance(faith.get("unfaithful"), list):
        return {}
    parts = [faith.get(key) for key in ("stored", "control", "codec")]
    numbers = [part.get(key) if isinstance(part, dict) else None for part in parts for key in AUDIT_NUMBERS]
    numbers += [one.get(key) if isinstance(one, dict) else None for one in truncation for key in TRUNCATION_NUMBERS]
    return found if all(_finite(number) for number in numbers) else {}


AUDIT_NUMBERS = ("mean_kl", "worst_kl", "worst_label", "worst_tail")
TRUNCATION_NUMBERS = (
    "k",
    "draws",
    "mass",
    "temperature",
    "gradient_error",
    "mean_gradient_error",
    "bytes_per_position",
)


def _caches(recipe: Recipe | None, missing: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    stats: list[dict[str, Any]] = []
    layers = []
    layer = heldout_layer(recipe) if recipe else None
    for path in recipe.cache if recipe else ():
        try:
            cache = Cache.open(path, layer, allow_partial=True)
            stats.append(cache.stats())
            layers.append(
                {"path": str(path), "cache_id": cache.cache_id, **(cache.layer.to_json() if cache.layer else {})}
            )
        except DecantError as error:
            missing.append(f"no figures of the cache: {error}")
    return (_sum_stats(stats) if stats else {}), layers


def _sum_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the figures of several caches; means are weighted by positions."""
    positions = [figures["positions"] for figures in stats]
    total: dict[str, Any] = {}
    for key in sorted({key for figures in stats for key in figures}):
        values = [figures.get(key) for figures in stats]
        numbers = [value if isinstance(value, int | float) else 0 for value in values]
        if key.startswith("mean_") or key in ("bytes_per_position", "entropy_bin_nats"):
            total[key] = math.fsum(n * p for n, p in zip(numbers, positions, strict=True)) / max(sum(positions), 1)
        elif any(isinstance(value, list) for value in values):
            lists = [value for value in values if isinstance(value, list)]
            total[key] = [sum(column) for column in zip(*lists, strict=False)]
        elif any(isinstance(value, dict) for value in values):
            total[key] = _sum_dicts([value for value in values if isinstance(value, dict)])
        else:
            total[key] = sum(numbers)
    return total


def _sum_dicts(values: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for value in values:
        for key, number in value.items():
            total[key] = (
                _sum_dicts([total.get(key, {}), number]) if isinstance(number, dict) else total.get(key, 0) + number
            )
    return total


def _seconds(path: Path, stages: Sequence[str], missing: list[str]) -> dict[str, float]:
    """Return seconds per phase in the order in which phases run."""
    found = _json(path)
    if found is None:
        missing.append("seconds.json is missing or cannot be read, so no phase has its time")
    order = ["teach", *(f"train.{stage}" for stage in stages)]
    known = {str(phase): float(value) for phase, value in (found or {}).items() if _finite(value)}
    first, last = [phase for phase in order if phase in known], ("evaluate", "report")
    rest = sorted(phase for phase in known if phase not in (*order, *last))
    return {phase: known[phase] for phase in (*first, *rest, *last) if phase in known}


def _subdirectories(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bounded(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    except OSError:
        return False


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if _bounded(path) else ""


def _json(path: Path) -> dict[str, Any] | None:
    return _object(_text(path))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [_object(line) for line in _text(path).splitlines()]
    return [row for row in rows if row is not None]


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

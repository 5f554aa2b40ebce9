"""What is kept of one model's evaluation, and when it may be used again.

    OUTPUT_DIR/evaluate/MODEL.json            identity, scores, held-out figures, seconds
    OUTPUT_DIR/evaluate/MODEL.answers.jsonl   every answer with its question and score
    OUTPUT_DIR/evaluate/MODEL.log             what the engine printed

The identity holds everything that the figures depend on: weights, tasks and the bytes of their files, template
settings, engine, held-out rows of which caches. Equal identity: the evaluation is reused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shared.atomic import write_atomic
from shared.cache.cache import Cache
from shared.cache.layer_choice import layer_of_capture, named_layer
from shared.cache.rows_left_out import rows_left_out
from shared.errors import EvaluationError, refused
from shared.identity.grown import unmoved
from shared.payload.narrowing import LayerView
from shared.recipe.recipe import Recipe, Stage, Task
from shared.text import strict_json
from tools.evaluate.models.model_ends import foreign_end_ids, named_ends
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.models.rendering import rendering_settings, source_of

RESULT_FORMAT = 3
"""Raised whenever figures would come out differently for the same inputs."""


def result_path(recipe: Recipe, name: str, ending: str = "json") -> Path:
    """Return a file of one model's evaluation."""
    return recipe.output_dir / "evaluate" / f"{name}.{ending}"


def evaluation_identity(recipe: Recipe, model: ModelUnderTest) -> dict[str, Any]:
    """Return everything that the figures of a model depend on.

    Raises:
        EvaluationError: a task's file cannot be read.
        CacheError: a cache cannot be read.
        ModelError: the model's weights cannot be read.
    """
    tasks = []
    for task in recipe.evaluate.tasks:
        rendering = rendering_settings(source_of(recipe, task))
        asked = task.model_dump(mode="json", exclude=unmoved(task, Task.NAMES_THE_RESULT))
        tasks.append({**asked, "file": _file_hash(Path(task.path)), "rendering": rendering})
    layer, several = heldout_layer(recipe, model.name), taught_layers(recipe) if recipe.heldout.fraction else {}
    by_layer = {name: [Cache.open(path, one).cache_id for path in recipe.cache] for name, one in several.items()}
    caches = [Cache.open(path, layer) for path in recipe.cache if recipe.heldout.fraction]
    recorded = caches[0].layer if caches and model.name == "teacher" else None
    precision = {} if recorded is None or recorded.dtype == "float32" else {"dtype": recorded.dtype}
    sources = [source_of(recipe, task) for task in recipe.evaluate.tasks]
    ends = foreign_end_ids(recipe, model, sources) if sources else []
    return {
        **named_ends(ends),
        "format": RESULT_FORMAT,
        "weights": model.weights_id(),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "engine": recipe.evaluate.engine,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "tasks": tasks,
        "heldout": {
            "fraction": recipe.heldout.fraction,
            "max_rows": recipe.evaluate.heldout_rows,
            "targets": None if layer is None else str(layer),
            "caches": [cache.cache_id for cache in caches],
            "seed": recipe.seed,
            **({"by_layer": by_layer} if by_layer else {}),
            **precision,
            **_left_out(recipe, caches),
        },
    }


def _left_out(recipe: Recipe, caches: Sequence[Cache]) -> dict[str, str]:
    """Name the held-out rows that are not measured; nothing where all are."""
    from student_train.evaluate.heldout_rows import heldout_rows

    marked = rows_left_out(caches, recipe).rows
    rows = heldout_rows(caches, recipe.heldout.fraction, None, ~marked) if marked.any() else []
    return {"left_out": xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())} if rows else {}


def heldout_layer(recipe: Recipe, model: str | None = None) -> str | LayerView | None:
    """Return the targets layer to measure a model on; None for the only one.

    A stage that learns from a teacher is measured on the layer that it learns from. Other models are measured on the
    first layer that a stage names, else on the one captured. Of a stage with several teachers, the layer captured or
    else the first counts here; `taught_layers` has them all.
    """
    named = next((found for stage in recipe.stages if (found := _named(recipe, stage)) is not None), None)
    stage = next((stage for stage in recipe.stages if stage.name == model), None)
    if stage is not None and named is not None and (stage.targets is not None or stage.needs_teacher):
        return _named(recipe, stage) or layer_of_capture(recipe) or named
    return named or layer_of_capture(recipe)


def taught_layers(recipe: Recipe) -> dict[str, str | LayerView | None]:
    """Return the layer of each teacher by its name, where a recipe or a stage has several; else nothing.

    Every model is measured on all of them, besides the layer that `heldout_layer` says.
    """
    stages = [stage.targets for stage in recipe.stages if isinstance(stage.targets, tuple)]
    if not stages and not recipe.teachers:
        return {}
    own = ["teacher"] if recipe.teachers else []
    names = dict.fromkeys([*own, *recipe.teachers, *(entry.layer for targets in stages for entry in targets)])
    return {name: named_layer(recipe, name) for name in names}


def _named(recipe: Recipe, stage: Stage) -> str | LayerView | None:
    """Return the layer that a stage names, the first of several teachers where none was captured."""
    if isinstance(stage.targets, tuple):
        return layer_of_capture(recipe) or named_layer(recipe, stage.targets[0].layer)
    return None if stage.targets is None else named_layer(recipe, stage.targets)


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a kept evaluation, or None where there is none that can be read."""
    try:
        found = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("identity"), dict) else None


def read_kept(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a kept evaluation of the same inputs, or None where there is none."""
    kept = read_result(path)
    return kept if kept is not None and same_identity(kept["identity"], identity) else None


def write_result(path: Path, result: Mapping[str, Any], answers: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Write an evaluation; NaN is refused, so that readers of any language can read it.

    `answers` are the lines of `MODEL.answers.jsonl` beside it. Until both are of one evaluation there is none, or what
    is kept would say of another's answers that they are its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if answers is not None:
        path.unlink(missing_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in answers)
        write_atomic(path.with_suffix(".answers.jsonl"), lines.encode(), "answers")
    write_atomic(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(), "evaluation")


def same_identity(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Tell whether a kept evaluation is of the same inputs (as JSON, so that tuples equal lists), wherever the tasks'
    files lie: their content counts.
    """
    return _placeless(json.loads(json.dumps(wanted))) == _placeless(kept)


def _placeless(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the paths of files whose bytes it has a hash of."""
    tasks = identity.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        return dict(identity)
    bare = [{name: value for name, value in task.items() if name != "path" or "file" not in task} for task in tasks]
    return {**identity, "tasks": bare}


def _file_hash(path: Path) -> str:
    if re.match(r"\w+://", str(path)):
        raise EvaluationError(f"{path}: a task's questions are read from a local file; download it first")
    try:
        with path.open("rb") as stream:
            return str(hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot read the task's questions: {refused(error)}") from error

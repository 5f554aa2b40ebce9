"""KL to the teacher on each model's own answers to held-out prompts: what a student does where it leads itself.

Every model answers, then the teacher scores all answers, then every model is measured: one process each, so that no
model shares a GPU with another. Answers and targets are in a cache of the run, one job per model, so that what was
answered and scored stays.

    OUTPUT_DIR/own/heldout             the answers
    OUTPUT_DIR/evaluate/MODEL.json     heldout.own: the figures, and what they were made of

Cost: the answers, one prefill of them by the teacher and one by each model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from shared.recipe.recipe import Recipe
from shared.seconds import add_seconds
from teacher_cache.prompts.files.prompt_files import content_hash
from teacher_cache.student_answers import Asking, answers_as
from tools.evaluate.models.forked_process import Forks
from tools.evaluate.models.model_process import run_in_process
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.results.results import read_result, result_path, same_identity, write_result

OWN_FORMAT = 1
"""Raised whenever figures would come out differently for the same inputs."""


def own_cache(recipe: Recipe) -> Path:
    """Return the cache of the models' answers to held-out prompts."""
    return recipe.output_dir / "own" / "heldout"


def asked_of_models(recipe: Recipe) -> tuple[Recipe, Asking]:
    """Return the recipe by which each model answers, and which of its prompts are asked."""
    asked = recipe.evaluate.own_answers
    assert asked is not None
    prompts = tuple(source for source in recipe.prompts if source.of_turns)
    generate = answers_as(recipe, asked, asked.seed)
    answering = recipe.model_copy(update={"prompts": prompts, "generate": generate, "cache": (own_cache(recipe),)})
    return answering, Asking(1, asked.prompts, recipe.heldout.fraction, True, asked.seed)


def measure_own_answers(
    recipe: Recipe, models: Mapping[str, ModelUnderTest], say: Callable[[str], None], forks: Forks
) -> dict[str, dict[str, Any]]:
    """Measure the models of an evaluation, or take what is kept; return model -> figures.

    Raises:
        EvaluationError: a model cannot answer, the teacher cannot score, or a process failed.
    """
    wanted = {name: own_identity(recipe, model) for name, model in models.items()}
    stale = [name for name, identity in wanted.items() if not same_identity(_kept(recipe, name), identity)]
    for name in stale:
        _step(recipe, "answer", name, wanted[name], say, forks)
    if stale:
        _step(recipe, "score", "teacher", {}, say, None)
    for name in stale:
        _step(recipe, "measure", name, wanted[name], say, forks)
    return {name: dict(_result(recipe, name)["heldout"]["own"]) for name in models}


def own_identity(recipe: Recipe, model: ModelUnderTest) -> dict[str, Any]:
    """Return everything that the figures of a model depend on.

    Raises:
        ModelError: its weights, or the teacher's, cannot be read.
        PromptError: prompts are missing.
    """
    assert recipe.evaluate.own_answers is not None
    return {
        "format": OWN_FORMAT,
        "weights": model.weights_id(),
        "dtype": model.dtype,
        "engine": recipe.evaluate.engine,
        "own_answers": recipe.evaluate.own_answers.model_dump(mode="json"),
        "fraction": recipe.heldout.fraction,
        "prompts": [content_hash(source) for source in recipe.prompts if not source.of_cache],
        "teacher": model_under_test(recipe, "teacher").weights_id(),
        "capture": {
            **{name: getattr(recipe.capture, name) for name in ("k", "draws", "mass", "label")},
            **recipe.capture.model_dump(mode="json", exclude={"hidden"}),
        },
    }


def write_own(recipe: Recipe, name: str, figures: Mapping[str, Any]) -> None:
    """Put figures into a model's evaluation."""
    result = _result(recipe, name)
    result["heldout"] = {**result["heldout"], "own": dict(figures)}
    write_result(result_path(recipe, name), result)


def _result(recipe: Recipe, name: str) -> dict[str, Any]:
    found = read_result(result_path(recipe, name))
    if found is None or found.get("heldout") is None:
        raise EvaluationError(f"'{name}' has no held-out figures to add to; remove {result_path(recipe, name)}")
    return found


def _kept(recipe: Recipe, name: str) -> dict[str, Any]:
    return dict(_result(recipe, name)["heldout"].get("own", {}).get("identity", {}))


def _step(
    recipe: Recipe,
    step: str,
    name: str,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    forks: Forks | None,
) -> None:
    say(f"own answers, {step}: {name}")
    job = {"recipe": json.loads(recipe.model_dump_json()), "step": step, "model": name, "identity": identity}
    log, started = result_path(recipe, name, f"own.{step}.log"), time.monotonic()
    run_in_process("tools.evaluate.own.own_process", job, log, name, say, forks=forks)
    add_seconds(recipe.output_dir, "evaluate", time.monotonic() - started)

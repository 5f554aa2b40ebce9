"""What each model costs on this machine, measured in one run: parameters, memory, first token, tokens per second.

Three rounds, in each of which every model runs once in a process of its own, one after another, so that a machine that
grows slower or faster meets all of them; every figure is the median of the rounds. All answer the same prompts,
greedily, after a warm-up. A figure is only worth comparing with others of the same run: kept figures are used again
only where every model, the engine and the machine are the same.

    OUTPUT_DIR/evaluate/cost/figures.json   identity, models, each with its rounds
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.recipe.recipe import Recipe, SideBySide
from shared.seconds import add_seconds
from tools.evaluate.models.model_process import run_in_process
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.results.results import read_kept, write_result
from tools.evaluate.side_by_side.side_prompts import SidePrompt, choose_prompts, digest_of

COST_FORMAT = 1
"""Raised whenever figures would come out differently for the same inputs."""
ROUNDS = 3
MEASURES = (
    *("parameters", "weights_bytes", "memory_bytes", "memory_above_start_bytes"),
    *("seconds_to_first_token", "tokens_per_second", "tokens_per_second_batched"),
)


def cost_path(recipe: Recipe) -> Path:
    """Return the file of a run's cost figures."""
    return recipe.output_dir / "evaluate" / "cost" / "figures.json"


def cost_prompts(recipe: Recipe) -> list[SidePrompt]:
    """Return the ten prompts that every model answers: held-out ones, else questions of tasks.

    Raises:
        EvaluationError: there is none.
    """
    place = "heldout" if recipe.heldout.fraction else "tasks"
    return choose_prompts(recipe, SideBySide(prompts=(place,)))


def measure_cost(recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every model of the recipe, or take what is kept; return model -> figures.

    Raises:
        EvaluationError: a model cannot be run.
    """
    models = {name: model_under_test(recipe, name) for name in recipe.evaluate.models}
    identity = cost_identity(recipe, models, cost_prompts(recipe))
    if (kept := read_kept(cost_path(recipe), identity)) is not None:
        say("reused cost of all models")
        return dict(kept["models"])
    started = time.monotonic()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for number in range(1, ROUNDS + 1):
        for name in models:
            say(f"cost, round {number} of {ROUNDS}: {name}")
            rounds[name].append(_measure(recipe, name))
    figures = {name: median_figures(of) for name, of in rounds.items()}
    add_ratios(figures)
    write_result(cost_path(recipe), {"identity": identity, "models": figures})
    add_seconds(recipe.output_dir, "evaluate", time.monotonic() - started)
    return figures


def cost_identity(
    recipe: Recipe, models: Mapping[str, ModelUnderTest], prompts: Sequence[SidePrompt]
) -> dict[str, Any]:
    """Return everything that the figures depend on, the machine among it.

    Raises:
        ModelError: a model's weights cannot be read.
    """
    return {
        "format": COST_FORMAT,
        "models": {name: [model.weights_id(), model.dtype, model.quantization] for name, model in models.items()},
        "engine": recipe.evaluate.engine,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "prompts": digest_of(prompts),
        "machine": [platform.node(), platform.machine(), os.cpu_count()],
    }


def median_figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of every measure over rounds, None where a round has none, and the rounds beside it."""
    figures: dict[str, Any] = {}
    for measure in MEASURES:
        values = [of.get(measure) for of in rounds]
        numbers = [value for value in values if value is not None]
        figures[measure] = statistics.median(numbers) if len(numbers) == len(values) else None
    same = {key: rounds[0].get(key) for key in ("memory_of", "engine", "device", "answered_tokens")}
    return {**figures, **same, "rounds": [{measure: of.get(measure) for measure in MEASURES[2:]} for of in rounds]}


def add_ratios(figures: dict[str, dict[str, Any]]) -> None:
    """Add `compression` (the teacher's parameters over the model's) and `speed_up` (tokens/s over the teacher's)."""
    teacher = figures.get("teacher", {})
    for own in figures.values():
        own["compression"] = _ratio(teacher.get("parameters"), own["parameters"])
        own["speed_up"] = _ratio(own["tokens_per_second"], teacher.get("tokens_per_second"))
        own["speed_up_batched"] = _ratio(own["tokens_per_second_batched"], teacher.get("tokens_per_second_batched"))


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _measure(recipe: Recipe, name: str) -> dict[str, Any]:
    job, log = {"recipe": recipe.model_dump_json(), "model": name}, cost_path(recipe).with_name(f"{name}.log")
    return dict(run_in_process("tools.evaluate.cost.cost_of_model", job, log, name, lambda line: None))

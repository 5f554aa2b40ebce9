"""Every model of a recipe on the same questions, prompts and held-out rows, one process each.

A kept evaluation of the same inputs is reused; seconds are added to the run's `evaluate` phase only where work was
done. Small models on a CPU run at the same time (`models.at_once`), others one after another: each may want the whole
machine. What is stale of one model is done in one start of its engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from shared.cache.cache import Cache
from shared.errors import EvaluationError
from shared.recipe.recipe import Recipe
from shared.seconds import add_seconds
from shared.text.printable import say as say_on_stderr
from tools.evaluate.cost.cost import measure_cost
from tools.evaluate.models.at_once import num_at_once, run_jobs
from tools.evaluate.models.forked_process import Forks
from tools.evaluate.models.model_process import run_in_process
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.own.own_answers import measure_own_answers
from tools.evaluate.results.results import evaluation_identity, read_kept, read_result, result_path
from tools.evaluate.results.teacher_distances import measure_distances
from tools.evaluate.sandbox import sandbox
from tools.evaluate.side_by_side.side_prompts import choose_prompts
from tools.evaluate.side_by_side.side_results import side_identity, side_path
from tools.evaluate.tasks.contamination import among_caches, sentence
from tools.evaluate.tasks.questions import read_questions
from tools.evaluate.tasks.registry import task_kind

PARTS = {"evaluation": result_path, "side_by_side": side_path}
"""What is kept of a model, and where."""


def evaluate_all(
    recipe: Recipe, allow_unsafe_code: bool = False, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Evaluate the recipe's models and return name -> result; `say` gets a line now and then (default: stderr).

    Raises:
        EvaluationError: a model does not exist, a task cannot be asked, or a model's process failed.
        CacheError: the cache cannot be read.
    """
    say = say or say_on_stderr
    if not recipe.evaluate.models:
        raise EvaluationError("evaluate.models names no model; list some of teacher, base and the stages' names")
    for task in (
        recipe.evaluate.tasks
    ):  # all of them before the first model starts: a bad row is found in a second, not in an hour
        read_questions(task, task_kind(task))
        if task_kind(task).runs_code:
            say(f"{task.domain}: programs run in the sandbox '{sandbox.require(allow_unsafe_code)}'")
    caches = [Cache.open_sequences(path) for path in recipe.cache if (path / "cache.json").is_file()]
    for task in recipe.evaluate.tasks:
        if said := sentence(task.domain, among_caches(recipe, task, caches)):
            say(f"{said}: its score says little about others")
    models = {name: model_under_test(recipe, name) for name in recipe.evaluate.models}
    wanted = {name: {"evaluation": evaluation_identity(recipe, model)} for name, model in models.items()}
    if recipe.evaluate.side_by_side is not None:
        prompts = choose_prompts(recipe)
        say(f"side by side: {len(prompts)} prompts")
        for name, model in models.items():
            wanted[name]["side_by_side"] = side_identity(recipe, model, prompts)
    with Forks(recipe.evaluate.engine) as forks:
        _do_what_is_stale(recipe, models, wanted, allow_unsafe_code, say, forks)
        results: dict[str, Any] = {name: read_result(result_path(recipe, name)) for name in models}
        if recipe.evaluate.own_answers is not None:
            for name, own in measure_own_answers(recipe, models, say, forks).items():
                results[name]["heldout"]["own"] = own
    measure_distances(recipe, say)
    if recipe.evaluate.cost:
        measure_cost(recipe, say)
    return results


def _do_what_is_stale(
    recipe: Recipe,
    models: Mapping[str, ModelUnderTest],
    wanted: Mapping[str, Mapping[str, Any]],
    unsafe: bool,
    say: Callable[[str], None],
    forks: Forks,
) -> None:
    """Evaluate what is not kept, of each model what is wanted of it."""
    stale: dict[str, dict[str, Any]] = {}
    for name, identities in wanted.items():
        left = {part: identity for part, identity in identities.items() if not _is_kept(recipe, name, part, identity)}
        if "evaluation" not in left:
            say(f"reused evaluation of {name}")
        if left:
            stale[name] = left
    at_once = num_at_once(recipe, [models[name] for name in stale])

    def evaluate(name: str) -> None:
        started = time.monotonic()
        _evaluate(recipe, name, stale[name], unsafe, say, 1 if at_once > 1 else None, forks)
        found = read_result(result_path(recipe, name))
        if found is None or any(not _is_kept(recipe, name, *part) for part in stale[name].items()):
            raise EvaluationError(f"evaluating '{name}' left no result; its log is {result_path(recipe, name, 'log')}")
        say(f"{name}: {_figures(found, stale[name])} ({time.monotonic() - started:.0f} s)")

    started = time.monotonic()
    try:
        run_jobs([partial(evaluate, name) for name in stale], at_once)
    finally:
        if stale:
            add_seconds(recipe.output_dir, "evaluate", time.monotonic() - started)


def _is_kept(recipe: Recipe, name: str, part: str, identity: Mapping[str, Any]) -> bool:
    return read_kept(PARTS[part](recipe, name), identity) is not None


def _evaluate(
    recipe: Recipe,
    name: str,
    wanted: dict[str, Any],
    unsafe: bool,
    say: Callable[[str], None],
    threads: int | None,
    forks: Forks,
) -> None:
    """Do what is stale of one model in a process of its own."""
    for part in wanted:
        PARTS[part](recipe, name).unlink(missing_ok=True)
    job = {"recipe": recipe.model_dump_json(), "model": name, "wanted": wanted, "allow_unsafe_code": unsafe}
    run_in_process("tools.evaluate.one_model", job, result_path(recipe, name, "log"), name, say, threads, forks)


def _figures(result: dict[str, Any], done: Mapping[str, Any]) -> str:
    if "evaluation" not in done:
        return "answered side by side"
    parts = [f"{domain} {100 * task['score']:.1f} %" for domain, task in result["tasks"].items()]
    if result["heldout"]:
        parts.append(f"held-out KL {result['heldout']['kl_nats']:.4f} nats")
    return ", ".join(parts) or "no tasks, nothing held out"

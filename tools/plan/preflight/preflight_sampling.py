"""What is known to be wrong with sampling temperatures before any work: those that no engine honours as they are.

vLLM samples at 0.01 where less is asked, with a line in its log alone, and refuses more than 2 once an engine runs; far
below 0.01, logits over a temperature are no numbers any more, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.recipe.base import Problem
from shared.recipe.sections.teacher import engine_of_student
from tools.plan.preflight.preflight_asked import Asked, Place

LOWEST = 0.01
HIGHEST_OF_VLLM = 2.0


def sampling_problems(asked: Asked) -> Iterator[Problem]:
    """Check every temperature that something is answered at, in the phases that will run."""
    for place, engine, temperature in _temperatures(asked):
        if 0 < temperature < LOWEST:
            said = f"no engine samples at a temperature of {temperature:g}; raise it to {LOWEST:g}, or set it to 0"
            yield place, f"{said}, which takes the most probable token"
        elif temperature > HIGHEST_OF_VLLM and engine != "transformers":
            whose = "vLLM samples" if engine == "vllm" else "servers sample"
            yield place, f"{whose} at temperatures up to {HIGHEST_OF_VLLM:g}, not at {temperature:g}; lower it"


def _temperatures(asked: Asked) -> Iterator[tuple[Place, str, float]]:
    recipe = asked.recipe
    teacher, evaluate = recipe.teacher, recipe.evaluate
    if "teach" in asked.phases and teacher is not None and recipe.generate is not None:
        yield ("generate", "temperature"), teacher.engine, recipe.generate.temperature
    for i, stage in enumerate(recipe.stages):
        if "answer" in asked.phases and teacher is not None and stage.rounds is not None:
            engine = engine_of_student(teacher, stage.rounds.engine)
            yield ("stages", i, "rounds", "temperature"), engine, stage.rounds.temperature
    if "eval" not in asked.phases:
        return
    for i, task in enumerate(evaluate.tasks):
        yield ("evaluate", "tasks", i, "temperature"), evaluate.engine, task.temperature
    for i, temperature in enumerate(evaluate.side_by_side.temperatures if evaluate.side_by_side else ()):
        yield ("evaluate", "side_by_side", "temperatures", i), evaluate.engine, temperature
    if evaluate.own_answers is not None:
        yield ("evaluate", "own_answers", "temperature"), evaluate.engine, evaluate.own_answers.temperature

"""What a recipe's further teachers would add to a plan: one scoring pass over every row that their layer lacks.

Cost: small files of the cache, and each teacher's weights sampled for its identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import EngineError
from shared.recipe.recipe import Recipe, Teacher
from tools.plan.plan_bounds import BOUNDS, NOTHING, sizes
from tools.plan.plan_existing import existing, target_bytes


def teachers_figures(recipe: Recipe, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return per teacher the tokens, positions and bytes, expected and at most, of what it is to score."""
    coming = {
        "tokens": planned.get("score_tokens", NOTHING) if planned.get("rows_to_do") else NOTHING,
        "positions": planned.get("positions", NOTHING) if planned.get("rows_to_do") else NOTHING,
    }
    found = {}
    for name in recipe.teachers:
        alone = recipe.of_teacher(name)
        there = existing(alone, [])
        tokens, positions = (
            {bound: there[f"unscored_{what}"] + coming[what][bound] for bound in BOUNDS}
            for what in ("tokens", "positions")
        )
        found[name] = {"tokens": tokens, "positions": positions, "bytes": target_bytes(alone, there, positions)}
    return found


def shorter_teachers(recipe: Recipe) -> list[str]:
    """Return a sentence for each further teacher that takes shorter rows than may be made, of which one stops it."""
    longest = None if recipe.teacher is None or not recipe.prompts else _takes(recipe.teacher)
    found = []
    for name, teacher in recipe.teachers.items():
        takes = _takes(teacher)
        if longest is not None and takes is not None and takes < longest:
            way = f"raise teachers.{name}.max_model_len, or lower teacher.max_model_len to {takes}"
            said = f"takes {takes:,} tokens and rows may have {longest:,}, which would stop it"
            found.append(f"teacher {name} {said}; {way}")
    return found


def _takes(teacher: Teacher) -> int | None:
    """Return the tokens of the longest row that a teacher takes; None where its files are out of reach."""
    from teacher_cache.teacher.model_files import resolve_model

    try:
        most = resolve_model(teacher.model, teacher.revision).max_position_embeddings
    except EngineError:
        return teacher.max_model_len
    return min(most, teacher.max_model_len or most)


def teachers_lines(figures: Mapping[str, Any]) -> list[str]:
    """Lay the figures out for people."""
    return [
        f"  teacher {name}: scores {of['tokens']['expected']:,} tokens, {of['positions']['expected']:,} positions, "
        f"{sizes(of['bytes'])}"
        for name, of in figures.items()
    ]

"""What a recipe's further teachers would add to a plan: one scoring pass over every row that their layer lacks.

Cost: small files of the cache, and each teacher's weights sampled for its identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.recipe.recipe import Recipe
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


def teachers_lines(figures: Mapping[str, Any]) -> list[str]:
    """Lay the figures out for people."""
    return [
        f"  teacher {name}: scores {of['tokens']['expected']:,} tokens, {of['positions']['expected']:,} positions, "
        f"{sizes(of['bytes'])}"
        for name, of in figures.items()
    ]

"""What a recipe's further teachers would add to a plan: one scoring pass over every row that their layer lacks.

Cost: small files of the cache, and each teacher's weights sampled for its identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shared.recipe.recipe import Recipe
from tools.plan.plan_existing import bytes_per_position, existing


def teachers_figures(recipe: Recipe, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return per teacher the tokens, positions and bytes, expected and at most, of what it is to score."""
    nothing = {"expected": 0, "at_most": 0}
    coming = {
        "tokens": planned.get("score_tokens", nothing) if planned.get("rows_to_do") else nothing,
        "positions": planned.get("positions", nothing) if planned.get("rows_to_do") else nothing,
    }
    found = {}
    for name in recipe.teachers:
        alone = recipe.of_teacher(name)
        there = existing(alone, [])
        low, high = bytes_per_position(alone, there)
        tokens, positions = (
            {bound: there[f"unscored_{what}"] + coming[what][bound] for bound in ("expected", "at_most")}
            for what in ("tokens", "positions")
        )
        size = {"expected": round(positions["expected"] * low), "at_most": round(positions["at_most"] * high)}
        found[name] = {"tokens": tokens, "positions": positions, "bytes": size}
    return found


def teachers_lines(figures: Mapping[str, Any], size: Callable[[int], str]) -> list[str]:
    """Lay the figures out for people."""
    return [
        f"  teacher {name}: scores {of['tokens']['expected']:,} tokens, {of['positions']['expected']:,} positions, "
        f"{size(of['bytes']['expected'])} expected, {size(of['bytes']['at_most'])} at most"
        for name, of in figures.items()
    ]

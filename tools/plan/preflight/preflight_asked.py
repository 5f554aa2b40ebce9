"""What is asked of a recipe, as the checks before any work see it, and how an attempt becomes a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DecantError
from shared.recipe.base import Problem
from shared.recipe.recipe import Recipe
from tools.plan.plan_existing import caches_there

Place = tuple[str | int, ...]
"""Of a value in a recipe."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a recipe."""

    recipe: Recipe
    phases: frozenset[str]
    """Those that will run: teach, train, eval, report."""
    plans_only: bool

    @property
    def caches(self) -> list[Path]:
        """Return the caches that are there."""
        return caches_there(self.recipe)

    @property
    def elsewhere(self) -> bool:
        """Return whether a recipe of stated sizes is only priced, on a machine without its files and packages."""
        return self.plans_only and bool(self.recipe.assume.model_fields_set)

    @property
    def builds(self) -> bool:
        """Return whether rows or targets may come that are not there yet."""
        return "teach" in self.phases


def said(place: Place, work: Callable[[], object]) -> Iterator[Problem]:
    """Yield what an attempt raises as a problem of a place; raises nothing itself."""
    try:
        work()
    except (DecantError, OSError) as error:
        yield place, " ".join(str(error).split())

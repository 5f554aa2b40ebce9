"""What is asked of a recipe, as the checks before any work see it, and how an attempt becomes a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import DecantError, refused
from shared.recipe.base import Problem
from shared.recipe.recipe import PromptSource, Recipe
from tools.plan.plan_existing import caches_there

if TYPE_CHECKING:
    from teacher_cache.student_answers import Asking

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


def said_of_prompts(
    place: Place, listed: Sequence[PromptSource], listed_at: Place, recipe: Recipe, asking: Asking
) -> Iterator[Problem]:
    """Check that there are as many prompts as a student is asked at a place; a file that is missing is a problem of its
    entry in the list of sources, where whoever else reads it says so, too.
    """
    from teacher_cache.prompts.files.prompt_files import locate
    from tools.plan.plan_prompts import require_prompts

    missing: list[Problem] = []
    for j, source in enumerate(listed):
        if source.of_turns:
            missing += said((*listed_at, j, "path"), partial(locate, source))
    yield from missing or said(place, partial(require_prompts, recipe, asking))


def said(place: Place, work: Callable[[], object]) -> Iterator[Problem]:
    """Yield what an attempt raises as a problem of a place; raises nothing itself."""
    try:
        work()
    except DecantError as error:
        yield place, " ".join(str(error).split())
    except OSError as error:
        yield place, " ".join(f"{error.filename or 'the system'}: {refused(error)}".split())

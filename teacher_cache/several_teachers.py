"""Several teachers over the same rows: the recipe's own answers and scores, then each of `teachers` scores in turn.

Each is a build of its own, one engine after another, and continues what is there. Cost: one scoring pass each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared.errors import UsageError
from shared.places import origin_of
from shared.recipe.base import closest, quoted
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from teacher_cache.passes.summary import BuildSummary

OWN = "teacher"
"""Name of the recipe's own teacher among several."""


def teach_each(
    recipe: Recipe,
    only: str | None = None,
    begin: Callable[[str], None] = lambda name: None,
    **settings: Any,
) -> dict[str, BuildSummary]:
    """Build what a recipe's teachers make of its cache, and return each one's summary by name.

    Args:
        recipe: with a teacher, perhaps with several.
        only: one of them alone: `teacher` or a name of `teachers`; the rows must be there for those.
        begin: told whose turn it is, where there are several.
        settings: as for `teach`.

    Raises:
        UsageError: there is no teacher of that name, or no cache yet for it.
        DecantError: as for `teach`.
    """
    names = [OWN, *recipe.teachers]
    if only is not None and only not in names:
        raise UsageError(f"--layer {only}: the recipe has the teachers {quoted(names)}{closest(only, names)}")
    cache = recipe.cache[0]
    if only not in (None, OWN) and origin_of(cache) is None and not (cache / "cache.json").is_file():
        raise UsageError(
            f"--layer {only}: there is no cache at {cache} yet whose rows it could score; make them first, "
            f"with --layer {OWN}"
        )
    found: dict[str, BuildSummary] = {}
    for name in names if only is None else [only]:
        if recipe.teachers:
            begin(name)
        is_own = name == OWN
        found[name] = teach(
            recipe if is_own else recipe.of_teacher(name), layer_name=None if is_own else name, **settings
        )
    return found

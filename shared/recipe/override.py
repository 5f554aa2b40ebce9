"""`--set a.b=c`: change a recipe's data before it is validated.

A path goes through keys, list indices, and list entries by their `name` or `source`: `stages.kd.trainer.max_steps=10`.
The value is YAML 1.2. Sections that the file left out are created; a list grows only by writing it whole.
"""

from __future__ import annotations

from typing import Any

from shared.errors import RecipeError
from shared.recipe.base import closest, quoted
from shared.recipe.yaml import Path, YamlProblem, parse_yaml


def apply_override(data: dict[str, Any], override: str) -> Path:
    """Change `data` in place as one `path=value` says and return the path, with indices instead of names.

    Raises:
        RecipeError: the override is not `path=value`, its value is no YAML, or the path leads nowhere.
    """
    dotted, sign, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not sign or not all(parts):
        raise RecipeError(f"--set {override}: expected path=value, such as stages.kd.trainer.max_steps=10")
    try:
        value = parse_yaml(text).data
    except YamlProblem as problem:
        raise RecipeError(f"--set {override}: {problem.sentence}") from problem
    path: Path = ()
    here: Any = data
    for i, part in enumerate(parts):
        key = _step(here, part, f"--set {override}", ".".join(parts[:i]))
        path = (*path, key)
        if i == len(parts) - 1:
            here[key] = value
        elif isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[key]
    return path


def _step(here: Any, part: str, label: str, where: str) -> str | int:
    """Return the key or index that one part of the path means in `here`."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise RecipeError(f"{label}: '{where}' is {here!r}, which has nothing inside; set '{where}' itself")
    if part.isascii() and part.isdigit():
        if len(part) < 10 and int(part) < len(here):
            return int(part)
        raise RecipeError(f"{label}: '{where}' has {len(here)} entries, so there is no {part} (they count from 0)")
    names = [str(item.get("name", item.get("source", ""))) if isinstance(item, dict) else "" for item in here]
    if names.count(part) == 1:
        return names.index(part)
    if names.count(part) > 1:
        raise RecipeError(
            f"{label}: '{where}' has {names.count(part)} entries called '{part}'; use an index, counted from 0"
        )
    known = [name for name in names if name]
    raise RecipeError(
        f"{label}: '{where}' has no entry '{part}', only {quoted(known) or 'unnamed ones'}{closest(part, known)}"
    )

"""The options of `decant cache audit` become settings; its result is kept in the recipe's run where there is one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from shared.atomic import write_atomic
from shared.errors import UsageError
from shared.schema import MAX_K, MAX_TEMPERATURES
from tools.audit.audit_cache import audit_cache, audit_text, settings_of


def run_audit(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Audit a cache as the options say; return the document and its text.

    Raises:
        UsageError: an option makes no sense.
        DecantError: the cache cannot be audited.
    """
    from shared.recipe.file import load_recipe

    recipe = load_recipe(args.recipe, []) if args.recipe is not None else None
    given = {name: getattr(args, name) for name in ("targets", "teacher", "adapter", "student", "rows", "seed")}
    given["ks"] = None if args.k is None else [int(k) for k in _numbers(args.k, "k", 1, MAX_K, whole=True)]
    given["masses"] = None if args.mass is None else _numbers(args.mass, "mass", 1e-9, 1.0)
    given["temperatures"] = (
        None if args.temperatures is None else _numbers(args.temperatures, "temperatures", 1e-3, 1e3)
    )
    found = audit_cache(args.cache, settings_of(recipe, given))
    if recipe is not None:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe.output_dir / "audit.json", (json.dumps(found, indent=1) + "\n").encode(), "audit")
    return found, audit_text(found)


def _numbers(text: str, option: str, least: float, most: float, *, whole: bool = False) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    sound = [number for number in numbers if least <= number <= most and (not whole or number == int(number))]
    if not numbers or len(sound) < len(numbers) or len(numbers) > MAX_TEMPERATURES:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"--{option} {text}: expected {kind} from {least:g} to {most:g} with commas between them")
    return numbers

"""The import rules name what they are about: a module that is new to `shared` is light by rule, too."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_rule_of_lightness_names_all_of_shared_but_the_room_with_torch() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (rule,) = [contract for contract in contracts if contract["type"] == "forbidden"]
    found = {f"shared.{path.stem}" for path in (ROOT / "shared").iterdir() if not path.name.startswith("__")}
    assert set(rule["source_modules"]) == found - {"shared.models"}
    assert not any("ignore_imports" in contract for contract in contracts)

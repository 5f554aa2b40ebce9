"""Rows written to a file and read by their format."""

from __future__ import annotations

import json
from pathlib import Path

from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts


def read(tmp_path: Path, rows: list[dict], row_format: str, **settings) -> tuple[list, Problems]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems()
    source = PromptSource(source="s", path=str(path), format=row_format, **settings)
    return list(read_prompts([source], problems)), problems

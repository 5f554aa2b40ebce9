"""docs/contributing.md names files and names in them that exist: a page of where things are must not lag behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text()
PATHS = sorted(set(re.findall(r"`((?:shared|teacher_cache|student_train|tools|tests|decant)/[\w./]+?)`", PAGE)))
NAMES = [
    ("shared/recipe/sections/losses.py", "LOSSES OnHiddenLayer Loss Literal"),
    ("shared/recipe/sections/prompts.py", "COLUMNS Literal"),
    ("teacher_cache/prompts/formats/alpaca.py", "FORMAT"),
    ("tools/evaluate/tasks/questions.py", "TaskKind read_row score_answers"),
    ("shared/recipe/sections/evaluation.py", "TaskName NAMES_THE_RESULT"),
    ("shared/recipe/sections/optimizers.py", "OPTIMIZERS"),
    ("teacher_cache/engines/__init__.py", "refusal open_engine"),
    ("student_train/stage/stage_identity.py", "_WITHOUT_EFFECT"),
    ("shared/recipe/sections/generate.py", "NAMES_THE_JOB"),
    ("shared/recipe/sections/curriculum.py", "NAMES_THE_PLAN"),
    ("tools/recipe_page.py", "EXAMPLES"),
    ("tools/report/more_tables.py", "more_tables Table"),
    ("tools/cli_cache_parser.py", "CACHE_COMMANDS"),
    ("tools/cache/cache_commands.py", "run_cache_command"),
    ("tests/student_train/test_every_setting.py", "SHOWN"),
    ("tests/shared/test_identity.py", "CHANGES"),
    ("tests/tools/evaluate/test_multiple_choice.py", "TASK_ROWS"),
    ("teacher_cache/prompts/formats/prompt_columns.py", "TURN_COLUMNS"),
    ("shared/recipe/sections/teacher.py", "_READ_BY engine_of_student"),
    ("shared/recipe/sections/losses.py", "LABEL_LOSSES LOSSES_WITHIN_HEAD TAKES_DRAWS_ALONE NEEDS_DRAWS"),
]


@pytest.mark.parametrize("path", [path for path in PATHS if "NAME" not in path])
def test_every_file_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path, names", NAMES)
def test_every_name_is_in_its_file(path: str, names: str) -> None:
    words = set(re.findall(r"\w+", (ROOT / path).read_text()))
    assert set(names.split()) <= words


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name
)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []

"""A report stays small however much was asked, and `make demo-full` asks what its description says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from shared.recipe.file import load_recipe
from tests.tools.report.fake_run import SCORES, make_run
from tools.report.build import build_report

ROOT = Path(__file__).parents[3]
MOST_BYTES = 3_000_000
NUM_PROMPTS = 60
"""More than a report shows of any temperature."""


@pytest.mark.slow
def test_a_report_with_more_answers_than_it_shows_at_three_temperatures_stays_below_three_megabytes(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    directory = run / "evaluate" / "side_by_side"
    directory.mkdir()
    for model in SCORES:
        rows = [
            {"temperature": temperature, "number": number, "label": "math",
            "prompt": f"Question {number} " + "and so on " * 150,
             "reference": "r " * 1000, "answer": f"{model} says {number} " + "at length " * 150, "tokens": 900,
             "truncated": False}
            for temperature in (0.1, 0.7, 1.2) for number in range(NUM_PROMPTS)
        ]  # fmt: skip
        (directory / f"{model}.answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = build_report([run])
    assert report["models"]["kd"]["side_by_side"]["0.7"]["answers"] == NUM_PROMPTS
    sizes = {name: (run / name).stat().st_size for name in ("report.html", "report.md", "report.json", "models.csv")}
    assert 300_000 < sizes["report.html"] < MOST_BYTES
    assert sum(sizes.values()) < MOST_BYTES


def test_demo_full_adds_three_temperatures_cost_and_audit_to_the_demos_run() -> None:
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("demo-full:"))
    assert "demo" in lines[start].split()[1:]
    commands = [shlex.split(line) for line in lines[start + 1 : start + 4]]
    overrides = [commands[0][i + 1] for i, part in enumerate(commands[0]) if part == "--set"]
    plain, full = load_recipe(ROOT / "recipes/demo.yaml"), load_recipe(ROOT / "recipes/demo.yaml", overrides)
    assert full.output_dir == plain.output_dir
    assert full.cache == plain.cache
    assert full.evaluate.cost
    assert full.evaluate.side_by_side is not None
    assert (full.evaluate.side_by_side.size, full.evaluate.side_by_side.temperatures) == ("quick", (0.1, 0.7, 1.2))
    assert {"teacher", "base"} < set(full.evaluate.models)
    assert re.search(r"cache audit runs/demo/cache --recipe recipes/demo\.yaml$", " ".join(commands[1]))
    assert commands[2][-2:] == ["report", str(plain.output_dir)]

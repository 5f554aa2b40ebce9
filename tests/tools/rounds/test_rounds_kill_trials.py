"""`kill -9` in each step of a round, then the same step: really kills, really compares."""

from __future__ import annotations

import json

import pytest

from tests.tools.rounds.tiny_run import make_models
from tools.bench.trials.rounds_kill_trials import main


@pytest.mark.slow
def test_killed_steps_end_in_the_same_rows_and_weights(tmp_path, capsys):
    teacher, student = make_models(tmp_path)
    rows = [{"messages": [{"role": "user", "content": f"How many apples, number {i}?"}]} for i in range(40)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--teacher", str(teacher), "--student", str(student), "--prompts", str(tmp_path / "math.jsonl")]
    assert main(["--kills", "5", *places, "--no-page"]) == 0
    assert "| all | 5 | " in capsys.readouterr().out

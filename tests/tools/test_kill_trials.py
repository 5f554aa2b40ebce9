"""Builds that are killed at random moments and continued, in short, and the judge that decides whether all is well."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import teacher_cache.engines as engines
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from tests.system.program import ROOT
from tests.teacher_cache.fake_engine import FakeEngine
from tests.tiny_models import make_qwen3
from tools.bench.trials.cache_comparison import differences


@pytest.mark.slow
def test_three_kills_leave_the_cache_of_an_unbroken_build():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench.trials.kill_trials",
            "--kills",
            "3",
            "--seed",
            str(random.randrange(10**6)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["kills"], summary["violations"]) == (0, 3, [])
    assert summary["caches"] >= 1 and summary["runs"] >= 3


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    """Two caches of equal rows, one by a build, one a copy, and one of other prompts."""
    directory = tmp_path_factory.mktemp("judge")
    patch = pytest.MonkeyPatch()
    patch.setattr(engines, "open_engine", lambda teacher, capture, **_: FakeEngine(teacher, capture))
    patch.setattr(engines, "refusal", lambda teacher, capture: None)
    model = make_qwen3(directory / "teacher")
    for name, numbers in (("whole", range(8)), ("more", range(2, 12))):
        prompts = directory / f"{name}.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"How many are {i}?"}) + "\n" for i in numbers))
        recipe = {
            "name": name,
            "output_dir": str(directory / "run"),
            "teacher": {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 64},
            "prompts": [{"source": "a", "path": str(prompts), "format": "prompt_completion"}],
            "generate": {"max_new_tokens": 16},
            "capture": {"k": 4},
            "cache": str(directory / name),
            "rows_per_part": 4,
        }
        teach(Recipe.model_validate(recipe))
    patch.undo()
    return directory


def test_the_judge_finds_nothing_in_a_copy(caches, tmp_path):
    shutil.copytree(caches / "whole", tmp_path / "copy")
    assert differences(caches / "whole", tmp_path / "copy", 0.0) == []


def test_the_judge_names_missing_and_surplus_rows(caches):
    found = differences(caches / "whole", caches / "more", 0.0)
    assert sum(problem.startswith("missing: row") for problem in found) == 2
    assert sum(problem.startswith("surplus: row") for problem in found) == 4


def test_the_judge_names_a_damaged_part(caches, tmp_path):
    shutil.copytree(caches / "whole", tmp_path / "copy")
    (part, *_) = sorted((tmp_path / "copy" / "targets").rglob("part-*.arrow"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert any("damaged" in problem for problem in differences(caches / "whole", tmp_path / "copy", 0.0))


def test_the_judge_misses_the_rows_of_a_part_without_targets(caches, tmp_path):
    shutil.copytree(caches / "whole", tmp_path / "copy")
    for path in list((tmp_path / "copy" / "targets").rglob("part-*-000001.*")):
        path.unlink()
    assert any(problem.startswith("missing: ") for problem in differences(caches / "whole", tmp_path / "copy", 0.0))

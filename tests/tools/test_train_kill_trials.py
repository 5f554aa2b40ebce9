"""The script that kills trainings: really kills, really compares."""

from __future__ import annotations

import pytest

from shared.recipe.recipe import Recipe
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_qwen3
from tools.bench.trials import train_kill_trials
from tools.bench.trials.train_kill_trials import SETTINGS, main, outcome, recipe_of


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    teacher = make_qwen3(root / "teacher", seed=1)
    return make_cache(root / "cache", teacher, sources=("math", "code", "aiops")), make_qwen3(
        root / "student", seed=2, spread=0.05
    )


def test_recipes_of_all_settings_are_valid_and_differ(paths, tmp_path):
    recipes = [Recipe.model_validate(recipe_of(setting, *paths, tmp_path)) for setting in SETTINGS]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(SETTINGS)


def test_outcome_sees_a_single_bit(tmp_path):
    stage = tmp_path / "train/kd"
    (stage / "model").mkdir(parents=True)
    (stage / "metrics.jsonl").write_bytes(b"one")
    (stage / "model/model.safetensors").write_bytes(b"two")
    before = outcome(tmp_path)
    assert len(before) == 2
    (stage / "model/model.safetensors").write_bytes(b"twp")
    assert outcome(tmp_path) != before


@pytest.mark.slow
def test_killed_trainings_end_in_the_same_bytes(paths, monkeypatch, capsys):
    monkeypatch.setattr(
        train_kill_trials, "SETTINGS", {name: SETTINGS[name] for name in ("two stages", "evaluation, best kept")}
    )
    cache, student = paths
    assert main(["--kills", "4", "--cache", str(cache), "--student", str(student), "--no-page"]) == 0
    assert "| all | 4 |  | 2 of 2 |" in capsys.readouterr().out

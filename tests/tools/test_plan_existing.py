"""What a plan says of a cache that is there, held against what builds with the same recipe then do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.cache.layout import list_layers
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe
from teacher_cache import engines
from teacher_cache.build import teach
from teacher_cache.calibration import calibrate
from tests.teacher_cache.fake_engine import FakeEngine
from tests.tiny_models import make_qwen3
from tools.plan.plan_calibrated import calibrated_figures
from tools.plan.planner import plan, plan_text


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return make_qwen3(directory / "first"), make_qwen3(directory / "second", seed=1)


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(engines, "open_engine", lambda teacher, capture, **_: FakeEngine(teacher, capture))


def recipe(tmp_path: Path, model: Path, **settings) -> Recipe:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        rows = [{"prompt": f"How many apples, {'many ' * i}number {i}?", "completion": str(i)} for i in range(24)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": "test",
        "output_dir": str(tmp_path / "run"),
        "teacher": {"model": str(model), "engine": "transformers", "max_model_len": 256},
        "prompts": [{"source": "a", "path": str(path), "format": "prompt_completion"}],
        "capture": {"k": 4},
        "cache": str(tmp_path / "cache"),
        "rows_per_part": 5,
    }
    return Recipe.model_validate({**document, **settings})


def test_a_layer_by_other_weights_is_not_done_whatever_their_directory_is_called(tmp_path, models):
    model = Path(shutil.copytree(models[0], tmp_path / "teacher"))
    teach(recipe(tmp_path, model))
    assert "rescore" not in plan(recipe(tmp_path, model))
    moved = Path(shutil.copytree(models[0], tmp_path / "moved"))
    assert "rescore" not in plan(recipe(tmp_path, moved))
    shutil.copy(models[1] / "model.safetensors", model / "model.safetensors")
    for other in (model, models[1]):
        planned = plan(recipe(tmp_path, other))
        assert (planned["rows_to_do"], planned["rescore"]["tokens"]) == (0, planned["cache"]["tokens"])
    done = teach(recipe(tmp_path, model))
    assert (done.scored.rows, done.scored.tokens) == (24, planned["rescore"]["tokens"])
    assert "rescore" not in plan(recipe(tmp_path, model))


def test_a_teacher_out_of_reach_is_compared_by_its_name_and_the_plan_says_so(tmp_path, models):
    model = Path(shutil.copytree(models[0], tmp_path / "teacher"))
    teach(recipe(tmp_path, model))
    shutil.rmtree(model)
    there, other = plan(recipe(tmp_path, model)), plan(recipe(tmp_path, tmp_path / "nobody"))
    assert "rescore" not in there and "rescore" in other
    assert any("its name is theirs" in line for line in there["assumptions"])


def test_scoring_what_is_there_has_the_hours_and_bytes_that_were_measured(tmp_path, models):
    teach(recipe(tmp_path, models[0]))
    (layer,) = list_layers(tmp_path / "cache").values()
    records = list_records(layer.directory)
    measured = sum(record.bytes for record in records) / sum(record.positions for record in records)
    (tmp_path / "run" / "seconds.json").write_text(json.dumps({"teach": 7200.0}))
    again = plan(recipe(tmp_path, models[1]))
    assert again["rescore"]["hours"] == pytest.approx(2.0)
    assert again["rescore"]["bytes"]["expected"] == pytest.approx(measured * again["rescore"]["positions"], abs=1)
    assert "2 hours at the rate" in plan_text(again) and "at most 2 hours" not in plan_text(again)
    wider = plan(recipe(tmp_path, models[0], capture={"k": 8}))
    per_position = wider["rescore"]["bytes"]["expected"] / wider["rescore"]["positions"]
    assert measured < per_position < 2 * measured
    assert any("as in a layer of the cache" in line for line in wider["assumptions"])
    answers = plan(recipe(tmp_path, models[1], generate={"max_new_tokens": 4}))
    assert "at most 2 hours" in plan_text(answers)


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 4}])
@pytest.mark.parametrize("max_model_len", [30, 44])
def test_rows_that_are_too_long_are_those_that_a_build_sets_aside(tmp_path, models, generate, max_model_len):
    teacher = {"model": str(models[0]), "engine": "transformers", "max_model_len": max_model_len}
    changed = recipe(tmp_path, models[0], teacher=teacher, generate=generate)
    planned = plan(changed)
    done = teach(changed, max_set_aside=1.0)
    words = "leaves no room" if generate else "max_model_len"
    too_long = [problem.sentence() for problem in done.set_aside if words in problem.reason]
    assert 0 < len(too_long) < 24
    assert (planned["set_aside"], planned["rows_to_do"]) == (len(too_long), 24 - len(too_long))
    assert planned["first_problem"] in too_long
    assert f"{len(too_long)} too long and set aside" in plan_text(planned)
    assert plan(changed)["rows_to_do"] == done.num_set_aside - len(too_long)


def test_rows_that_were_not_looked_at_are_too_long_in_the_same_share(tmp_path, models, monkeypatch):
    monkeypatch.setattr("tools.plan.plan_prompts.ROWS_COUNTED", 4)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{'many ' * (60 * (i % 2))}{i}?", "completion": str(i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"model": str(models[0]), "engine": "transformers", "max_model_len": 60}
    planned = plan(recipe(tmp_path, models[0], teacher=teacher))
    assert 11 <= planned["set_aside"] <= 13 and planned["set_aside"] + planned["rows_to_do"] == 24


@pytest.mark.parametrize("label", ["", "taken"])
def test_a_cache_among_the_sources_is_calibrated_by_its_rows(tmp_path, models, label):
    teach(recipe(tmp_path, models[0]))
    source = {"path": str(tmp_path / "cache"), "format": "cache"} | ({"source": label} if label else {})
    second = recipe(tmp_path, models[1], prompts=[source], cache=str(tmp_path / "second"))
    found = calibrate(second, 12)
    assert found.rows == 12 and list(found.rows_by_source) == [label or "a"]
    planned = plan(second)
    figures = calibrated_figures(second, planned, found, None)
    assert (figures["rows"], figures["score_tokens"]) == (24, plan(recipe(tmp_path, models[0]))["cache"]["tokens"])
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("positions, max_length, limit", [(40, None, 40), (256, 44, 44), (30, 50, 30)])
def test_rows_that_training_cuts_are_those_that_the_plan_says(tmp_path, models, positions, max_length, limit):
    from shared.cache.cache import Cache
    from student_train.order.order import StageRows, plan_epoch

    student = Path(shutil.copytree(models[1], tmp_path / "student"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    trainer = {"max_steps": 1, "pack_tokens": 128}
    stage = {"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": trainer, "max_length": max_length}
    changed = recipe(tmp_path, models[0], student={"model": str(student)}, stages=[stage])
    before = plan(changed)["stages"]["kd"]["lengths"]
    teach(changed)
    planned = plan(changed)
    found, lengths = planned["stages"]["kd"]["lengths"], Cache.open(tmp_path / "cache").num_tokens
    cut = plan_epoch(StageRows(0, lengths, None, 128, limit), 0, None).num_cut
    assert (found["limit"], found["rows_above"], found["longest_to_come"]) == (limit, cut, 0) and 0 < cut < 24
    assert before["longest_to_come"] == lengths.max()
    assert f"{cut} rows of the cache above {limit} tokens" in plan_text(planned)


def test_rows_that_a_stage_refuses_are_found_before_any_work(tmp_path, models, capsys):
    from tools import cli

    student = Path(shutil.copytree(models[1], tmp_path / "student"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    stage = {"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": {"max_steps": 1, "pack_tokens": 128}}
    settings = {"student": {"model": str(student)}, "stages": [{**stage, "too_long": "refuse"}]}
    chosen = recipe(tmp_path, models[0], **settings)
    teach(chosen)
    (tmp_path / "recipe.yaml").write_text(chosen.model_dump_json(exclude_none=True))
    for command in ("plan", "train", "run"):
        assert cli.main([command, str(tmp_path / "recipe.yaml")]) == 2
        error = capsys.readouterr().err
        assert "stages.0.too_long" in error and "knows 32 positions" in error
    assert not (tmp_path / "run" / "train").exists()

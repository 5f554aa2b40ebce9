"""Extrapolation from a calibration against sums done by hand, and what the command refuses."""

from __future__ import annotations

import json

import pytest

from shared.recipe.recipe import Recipe
from teacher_cache.calibration import Calibration, PassRate
from tests.tiny_models import make_qwen3
from tools.cli import main
from tools.plan.plan_calibrated import calibrated_figures, calibrated_text

FOUND = Calibration(
    rows=100,
    seconds=20.0,
    start_seconds=5.0,
    generate=PassRate(2.0, 1000.0),
    score=PassRate(1.0, 4000.0),
    rows_by_source={"a": 80, "b": 20},
    tokens_by_source={"a": 80 * 50, "b": 20 * 200},
    positions_by_source={"a": 80 * 10, "b": 20 * 100},
    target_bytes_per_position=70.0,
    sequence_bytes_per_token=12.0,
    record_bytes_per_part=3000.0,
    mean_support=40.0,
    provenance={"device": "cpu"},
)


def source(rows: int, in_cache: int = 0) -> dict:
    return {"rows": rows, "rows_in_cache": in_cache, "prompt_tokens": 7, "answer_tokens": {"expected": 5, "at_most": 9}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher")


def recipe(model, **teacher) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": "run",
            "cache": "run/cache",
            "teacher": {"model": str(model), "engine": "vllm", **teacher},
            "prompts": [{"source": name, "path": "nowhere.jsonl", "format": "messages"} for name in ("a", "b")],
            "generate": {},
            "rows_per_part": 100,
        }
    )


PLANNED = {"sources": {"a": source(1100, 100), "b": source(500)}, "cache": {"rows": 100}}


def test_every_source_counts_with_its_own_means(model):
    found = calibrated_figures(recipe(model), PLANNED, FOUND, 2.0)
    answers, whole = 1000 * 10 + 500 * 100, 1000 * 50 + 500 * 200
    assert (found["rows"], found["generate_tokens"], found["score_tokens"]) == (1500, answers, whole)
    assert found["seconds"]["generate"] == pytest.approx(2 + answers / 1000)
    assert found["seconds"]["score"] == pytest.approx(1 + whole / 4000)
    assert found["seconds"]["all"] == pytest.approx(5 + 2 + 60 + 1 + 37.5)
    assert found["bytes"] == {
        "targets": answers * 70,
        "sequences": whole * 12,
        "records": 15 * 3000,
        "all": answers * 70 + whole * 12 + 45_000,
    }
    assert found["money"] == pytest.approx(105.5 / 3600 * 2)
    text = calibrated_text(found)
    assert "measured on a CPU, so arithmetic only" in text
    assert "generate 1,000 tokens/s and 2.0 s to fill and empty the engine" in text


def test_engines_divide_tokens_but_neither_start_nor_fixed_times(model):
    found = calibrated_figures(
        recipe(model, engine="server", servers=[f"http://h{i}:1" for i in range(4)]), PLANNED, FOUND, 3.0
    )
    assert found["engines"] == 4
    assert found["seconds"]["all"] == pytest.approx(5 + 2 + 15 + 1 + 37.5 / 4)
    assert found["money"] == pytest.approx(found["seconds"]["all"] / 3600 * 4 * 3)


def test_rows_that_only_lack_targets_are_scored_and_add_no_sequences(model):
    planned = {"sources": {}, "cache": {"rows": 250}, "rescore": {"tokens": 8000, "positions": 500}}
    found = calibrated_figures(recipe(model), planned, FOUND, None)
    assert (found["seconds"]["generate"], found["seconds"]["score"]) == (0, pytest.approx(3))
    assert found["bytes"] == {"targets": 35_000, "sequences": 0, "records": 9000, "all": 44_000}
    assert found["money"] is None


def test_given_answers_are_those_that_were_counted(model):
    given = recipe(model).model_copy(update={"generate": None})
    found = calibrated_figures(given, {"sources": {"a": source(10)}, "cache": {"rows": 0}}, FOUND, None)
    assert (found["score_tokens"], found["target_positions"], found["generate_tokens"]) == (12, 5, 0)


def test_memory_is_weights_cache_and_buffers(model):
    memory = calibrated_figures(recipe(model, max_model_len=64), PLANNED, FOUND, None)["gpu_memory"]
    config = json.loads((model / "config.json").read_text())
    stored = {"float32": 4, "bfloat16": 2}[config["dtype"]]
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert memory["weights"] == pytest.approx(weights * 2 / stored)
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    assert memory["key_value_cache"] == 64 * 64 * per_token
    entries = 1024 * config["vocab_size"]  # the runner scores 1,024 rows at a time, the plug-in works in three buffers
    assert memory["logprob_buffers"] == 4 * (entries + 3 * min(entries, 2**26))
    halves = calibrated_figures(recipe(model, tensor_parallel_size=2), PLANNED, FOUND, None)["gpu_memory"]
    assert halves["weights"] == pytest.approx(memory["weights"] / 2, abs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--price-per-hour", "2"], "needs --calibrate"),
        (["--calibrate", "--card", "24GiB"], "one at a time"),
        (["--calibrate", "3"], "is no sample"),
        (["--calibrate", "--price-per-hour", "x"], "is no price"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "recipe.yaml", *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err

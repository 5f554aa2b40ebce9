"""Cost of models: counted parameters, ratios, rounds by turns, and figures that are used again only
for the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from shared.recipe.recipe import Recipe
from tests.tiny_models import make_llama, make_qwen3
from tests.tools.evaluate.heldout_cache import build_cache
from tools.evaluate.cost import cost
from tools.evaluate.cost.cost_of_model import measure_model, parameter_figures, resident_bytes
from tools.evaluate.models.models import model_under_test
from tools.report.more_tables import cost_table
from tools.report.numbers import data_size, times


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cost")
    build_cache(root / "cache", make_qwen3(root / "teacher", hidden_size=96, num_layers=3))
    make_llama(root / "student")
    return root


def recipe(root: Path, **evaluate: Any) -> Recipe:
    settings = {"models": ["teacher", "base"], "engine": "transformers", "max_new_tokens": 8, "cost": True, **evaluate}
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(root / "out"),
            "teacher": {"model": str(root / "teacher"), "dtype": "bfloat16"},
            "cache": str(root / "cache"),
            "student": {"model": str(root / "student")},
            "heldout": {"fraction": 0.4},
            "evaluate": settings,
        }
    )


@pytest.mark.parametrize(("name", "directory", "width"), [("teacher", "teacher", 2), ("base", "student", 4)])
def test_parameters_are_those_of_the_loaded_model_and_bytes_those_of_its_type_at_run_time(
    root: Path, name: str, directory: str, width: int
) -> None:
    expected = sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(root / directory).parameters()
    )
    found = parameter_figures(model_under_test(recipe(root), name))
    assert found == {"parameters": expected, "weights_bytes": width * expected}


def test_a_measured_model_has_every_figure(root: Path) -> None:
    held = bytearray(50_000_000)
    held[::4096] = b"x" * len(held[::4096])
    found = measure_model(recipe(root), "base")
    assert set(cost.MEASURES) <= set(found)
    assert found["memory_bytes"] > resident_bytes("VmRSS") // 2 > len(held) // 2
    assert found["seconds_to_first_token"] > 0
    assert 0 < found["answered_tokens"] <= 80


def test_rounds_take_turns_and_the_median_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    speed = {"teacher": [10.0, 30.0, 20.0], "base": [100.0, 500.0, 60.0]}

    def measure(chosen: Recipe, name: str) -> dict[str, Any]:
        order.append(name)
        figures = dict.fromkeys(cost.MEASURES, 1.0) | {
            "parameters": 1000 if name == "teacher" else 250,
            "memory_of": "memory",
        }
        return figures | {"tokens_per_second": speed[name][order.count(name) - 1], "memory_above_start_bytes": None}

    monkeypatch.setattr(cost, "_measure", measure)
    figures = cost.measure_cost(recipe(root), lambda line: None)
    assert order == ["teacher", "base"] * 3
    assert (figures["teacher"]["tokens_per_second"], figures["base"]["tokens_per_second"]) == (20.0, 100.0)
    assert (figures["base"]["compression"], figures["base"]["speed_up"], figures["teacher"]["speed_up"]) == (
        4.0,
        5.0,
        1.0,
    )
    assert figures["base"]["memory_above_start_bytes"] is None
    assert cost.measure_cost(recipe(root), lambda line: None) == figures
    assert len(order) == 6
    make_llama(root / "student", seed=9)
    order.clear()
    cost.measure_cost(recipe(root), lambda line: None)
    assert len(order) == 6  # one model changed: all are measured again, since only one run compares
    order.clear()
    alone = cost.measure_cost(recipe(root, models=["base"]), lambda line: None)
    assert (alone["base"]["compression"], alone["base"]["speed_up"]) == (None, None)


def test_the_table_has_a_row_per_measured_model() -> None:
    figures = dict.fromkeys((*cost.MEASURES, "compression", "speed_up", "speed_up_batched"), None) | {
        "parameters": 1_500_000,
        "compression": 5.82,
        "memory_bytes": 2.5e9,
    }
    report = {
        "models": {
            "teacher": {"cost": None},
            "kd": {"cost": {**figures, "seconds_to_first_token": 0.0123, "memory_of": "RAM"}},
        }
    }
    table = cost_table(report)
    assert table.rows == [["kd", "1,500,000", "5.82x", "–", "2.5 GB", "12 ms", "–", "–", "–", "–"]]
    assert "Peak memory: RAM" in table.legend
    assert (times(12.4), times(None), data_size(999), data_size(1_234_567)) == ("12x", "–", "999 B", "1.2 MB")


def test_cost_without_anything_to_ask_is_refused(root: Path) -> None:
    plain = recipe(root).model_dump(mode="json")
    with pytest.raises(ValueError, match="there is nothing to ask"):
        Recipe.model_validate({**plain, "heldout": {"fraction": 0}})


@pytest.mark.slow
def test_real_processes_are_measured_and_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 1)
    figures = cost.measure_cost(recipe(root), lambda line: None)
    kept = json.loads((root / "out" / "evaluate" / "cost" / "figures.json").read_text())
    assert kept["models"] == figures
    assert all(len(of["rounds"]) == 1 and of["memory_above_start_bytes"] > 0 for of in figures.values())

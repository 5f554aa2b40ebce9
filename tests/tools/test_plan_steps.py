"""The steps that a plan says, against those that training then makes."""

from __future__ import annotations

import json

import pytest

from shared.cache.cache import Cache
from shared.recipe.recipe import Recipe
from student_train.stage.stages import run_stages
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_qwen3
from tools.plan.planner import plan, plan_text

MOVING = {"math": {"kind": "linear", "start": 0.1, "end": 0.9}, "ops": 0.4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan_steps")
    make_cache(root / "cache", make_qwen3(root / "teacher", seed=1))
    make_qwen3(root / "student", seed=2, spread=0.05)
    return root


def recipe(place, output, trainer=None, **stage):
    trainer = {"num_train_epochs": 2, "pack_tokens": 64, "report_to": "none", "save_steps": 100, **(trainer or {})}
    return Recipe.model_validate(
        {
            "name": "steps",
            "output_dir": str(output),
            "cache": str(place / "cache"),
            "heldout": {"fraction": 0.1},
            "student": {"model": str(place / "student")},
            "stages": [{"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": trainer, **stage}],
        }
    )


@pytest.mark.parametrize(
    "trainer, stage",
    [
        ({}, {}),
        ({"num_train_epochs": 1.5, "pack_tokens": 128, "gradient_accumulation_steps": 3}, {"max_length": 40}),
        ({"num_train_epochs": 3}, {"mixture": {"math": 1.0}}),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 2}, {"mixture": MOVING}),
        ({"max_steps": 3}, {}),
    ],
    ids=["packs that are not full", "part of an epoch", "one source", "moving shares", "max_steps"],
)
def test_steps_over_rows_that_are_there_are_those_that_are_made(place, tmp_path, trainer, stage):
    wanted = recipe(place, tmp_path / "run", trainer, **stage)
    result = plan(wanted)
    planned = result["stages"]["kd"]
    run_stages(wanted)
    steps = [json.loads(line) for line in (tmp_path / "run/train/kd/metrics.jsonl").read_text().splitlines()]
    assert (planned["steps"], planned["estimated"]) == (len(steps), False)
    assert planned["epochs"] == pytest.approx(steps[-1]["epoch"], abs=0.01)
    assert sum(step["tokens"] for step in steps) <= planned["tokens"]
    assert f"train kd: {len(steps)} steps of" in plan_text(result)


@pytest.mark.parametrize("mixture", [None, {"ops": 1.0}])
def test_steps_are_said_to_be_about_where_rows_are_to_come(place, tmp_path, mixture):
    cache = Cache.open_sequences(place / "cache")
    lengths = [len(row.token_ids) for row in cache if mixture is None or row.source in mixture]
    one = recipe(place, tmp_path / "run", mixture=mixture)
    wanted = one.model_copy(update={"cache": (*one.cache, tmp_path / "to come")})
    result = plan(wanted)
    planned = result["stages"]["kd"]
    assert planned["estimated"]
    assert planned["steps"] == -(-2 * 0.9 * sum(lengths) // 64)
    assert f"train kd: about {planned['steps']} steps of 64 tokens" in plan_text(result)
    assert any("full packs" in line for line in result["assumptions"])

"""Every recipe of the repository validates and is priced, and the five published systems run end to end in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shared.recipe.file import load_recipe
from tests.system.program import ROOT, decant
from tests.system.recipe_twins import EVERY, STEPS, report_of, write_twin
from tools.plan.plan_card import Cards, plan_card
from tools.plan.planner import plan

NOT_RECIPES = ROOT / "recipes" / "cluster"
"""What is there is for a cluster's own tools."""
NUM_RECIPES = 8
SYSTEMS = (
    "code-analyst",
    "large-to-small-fast",
    "large-to-small-precise",
    "kd-verify",
    "qwen3-course",
    "multi-stage-medical",
)


def recipe_files() -> list[Path]:
    found = sorted((ROOT / "recipes").rglob("*.yaml"))
    return [path for path in found if NOT_RECIPES not in path.parents]


def test_every_recipe_validates():
    files = recipe_files()
    assert len(files) == NUM_RECIPES
    assert {path.stem for path in files} >= set(SYSTEMS)
    for path in files:
        assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_at_true_size_is_priced_from_the_sizes_that_it_states(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    stated, priced = recipe.assume.sources, plan(recipe)
    assert {source: figures["rows"] for source, figures in priced["sources"].items()} == {
        s: a.rows for s, a in stated.items()
    }
    assert sum("as the recipe states" in line for line in priced["assumptions"]) >= len(stated)
    assert priced["bytes"]["at_most"] >= priced["bytes"]["expected"] > 0
    assert all(stage["steps"] > 0 for stage in priced["stages"].values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_students_training_at_true_size_fits_24_gib_or_the_plan_says_what_would(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    fits = plan_card(recipe, Cards(1, 24 * 2**30))["stages"]
    assert list(fits) == [stage.name for stage in recipe.stages]
    assert all(stage["note"] and "assume.student" in stage["note"] for stage in fits.values())


class Twin:
    """A twin that has run from prompts to report."""

    def __init__(self, name: str, place: Path) -> None:
        self.place = place
        self.data = write_twin(name, place)
        decant(place, "run", "twin.yaml", "--json")
        self.recipe = load_recipe(place / "twin.yaml")
        self.report = report_of(place)

    def steps(self, stage: str) -> list[dict]:
        text = (self.place / "run" / "train" / stage / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def check_every_stage(self) -> None:
        """Weights and temperatures of every step are those of the recipe, losses are finite, every model was
        evaluated."""
        for stage in self.recipe.stages:
            steps = self.steps(stage.name)
            assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
            for number, step in enumerate(steps):
                progress = number / (STEPS - 1)
                names = [loss.name for loss in stage.losses]
                assert list(step["terms"]) == names
                assert step["temperatures"] == {loss.name: loss.temperature.value(progress) for loss in stage.losses}
                assert all(math.isfinite(value) for value in step["terms"].values())
                if stage.balance.kind == "fixed":
                    assert step["weights"] == pytest.approx(
                        {loss.name: loss.weight.value(progress) for loss in stage.losses}
                    )
            assert json.loads((self.place / "run" / "train" / stage.name / "health.json").read_text())["healthy"]
        assert list(self.report["models"]) == list(self.recipe.evaluate.models)
        for model in self.report["models"].values():
            assert model["heldout"]["kl_nats"] >= 0
            assert model["heldout"]["perplexity"] > 1

    def layers(self) -> list[dict]:
        found = [
            json.loads(path.read_text()) for path in (self.place / "run" / "cache" / "targets").glob("*/layer.json")
        ]
        return [layer["identity"] for layer in found]

    def shares(self, stage: str) -> list[dict[str, float]]:
        """Return each step's tokens by source as shares."""
        rows = [step["tokens_by_source"] for step in self.steps(stage)]
        return [{source: tokens / sum(row.values()) for source, tokens in row.items() if tokens} for row in rows]


@pytest.mark.slow
def test_code_analyst_in_small(tmp_path):
    twin = Twin("code-analyst", tmp_path)
    twin.check_every_stage()
    assert [step["weights"]["cross_entropy"] for step in twin.steps("kd")] == [0.5, 0.5, 0.3, 0.3, 0.1, 0.1]
    assert set(twin.steps("kd")[0]["terms"]) == {"cross_entropy", "forward_kl", "hidden", "attention"}
    (identity,) = twin.layers()
    assert identity["adapter"]
    assert identity["temperatures"] == [1.0, 3.0]
    assert (identity["k"], identity["draws"]) == (32, 16)
    student = twin.report["models"]["kd"]
    assert set(student["side_by_side"]) == {"0.1", "0.7", "1.2"}
    assert student["cost"]["parameters"] < twin.report["models"]["teacher"]["cost"]["parameters"]
    assert list((tmp_path / "run" / "train" / "kd" / "tensorboard").glob("events.out.*"))
    assert twin.recipe.student.gradient_checkpointing
    assert not any("projection" in name for name in _weights(tmp_path / "run" / "train" / "kd" / "model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "temperature", "alpha"), [("large-to-small-fast", 2.0, 0.5), ("large-to-small-precise", 3.0, 0.3)]
)
def test_large_to_small_in_small(name, temperature, alpha, tmp_path):
    twin = Twin(name, tmp_path)
    twin.check_every_stage()
    assert list(twin.steps("sft")[0]["terms"]) == ["cross_entropy"]
    assert twin.steps("kd")[0]["weights"] == pytest.approx({"cross_entropy": alpha, "forward_kl": 1 - alpha})
    assert twin.steps("kd")[0]["temperatures"]["forward_kl"] == temperature
    for model in twin.report["models"].values():
        assert len(model["tasks"]) == 3
        assert all(0 <= task["score"] <= 1 for task in model["tasks"].values())
    names = {"report.html", "report.md", "models.csv", "report.json"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    # KD starts where SFT ended: the same weights give the first step's cross-entropy on their own rows
    assert twin.recipe.stage("kd").init_from == "sft"


@pytest.mark.slow
def test_kd_verify_in_small(tmp_path):
    twin = Twin("kd-verify", tmp_path)
    twin.check_every_stage()
    assert twin.steps("kd")[0]["weights"] == {"forward_kl": 0.8, "cross_entropy": 0.2}
    for name in ("teacher", "base", "kd"):
        figures = twin.report["models"][name]["side_by_side"]
        assert set(figures) == {"0.1", "0.7", "1.2"}
    assert (tmp_path / "run" / "train" / "kd" / "samples.jsonl").stat().st_size
    evaluations = (tmp_path / "run" / "train" / "kd" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == list(range(0, STEPS + 1, EVERY))


@pytest.mark.slow
def test_qwen3_course_in_small(tmp_path):
    twin = Twin("qwen3-course", tmp_path)
    twin.check_every_stage()
    assert twin.recipe.generate is None
    assert twin.steps("kd")[0]["temperatures"]["forward_kl"] == 5.0
    (identity,) = twin.layers()
    assert identity["temperatures"] == [1.0, 5.0]
    assert {twin.report["models"][name]["heldout"]["perplexity"] > 1 for name in ("teacher", "base", "kd")} == {True}


@pytest.mark.slow
def test_multi_stage_medical_in_small(tmp_path):
    twin = Twin("multi-stage-medical", tmp_path)
    twin.check_every_stage()
    assert all(set(shares) == {"general"} for shares in twin.shares("general"))
    domain = [shares.get("general", 0.0) for shares in twin.shares("domain")]
    assert sum(domain[:3]) > sum(domain[3:])
    assert list(twin.steps("domain")[0]["terms"]) == [
        "forward_kl",
        "cross_entropy",
        "hidden",
        "attention",
        "contrastive",
    ]
    weights = [step["weights"] for step in twin.steps("domain")]
    assert weights[0] != weights[-1], "gradient norms move the weights"
    assert all("general" not in shares for shares in twin.shares("tuning"))
    for stage in ("domain", "tuning"):
        assert (tmp_path / "run" / "train" / stage / "samples.jsonl").stat().st_size
    again = decant(tmp_path, "train", "twin.yaml", "--from-stage", "domain", "--to-stage", "tuning")
    assert "is reused" in again.stderr + again.stdout


def _weights(directory: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            names += list(file.keys())
    return names

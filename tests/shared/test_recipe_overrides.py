"""Overrides of a recipe: paths to keys, by number and by name, values as YAML, and what leads nowhere."""

from __future__ import annotations

import pytest

from shared.recipe.file import load_recipe
from tests.shared.test_recipe_file import GOOD, complaint


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def test_overrides_reach_keys_indices_and_names(good):
    recipe = load_recipe(
        good,
        [
            "stages.kd.trainer.max_steps=10",
            "stages.0.trainer.max_steps=20",
            "prompts.on.limit=5",
            "capture.k=8",
            "generate={temperature: 0}",
            "stages.kd.losses.forward_kl.weight={kind: linear, start: 1, end: 0}",
            "student.adapter={kind: lora, r: 4}",
            "name=no",
        ],
    )
    assert [stage.trainer.max_steps for stage in recipe.stages] == [20, 10]
    assert [source.limit for source in recipe.prompts] == [None, 5]
    assert (recipe.capture.k, recipe.generate.temperature, recipe.student.adapter.r, recipe.name) == (8, 0.0, 4, "no")
    assert recipe.stages[1].losses[0].weight.end == 0.0


@pytest.mark.parametrize("override", [
    ["capture.mode=sample", "capture.draws=8", "capture.temperatures=[2]"],
    ["teacher.engine=server", "teacher.servers=[http://a/v1]", "teacher.server_requests=3"],
])  # fmt: skip
def test_overrides_choose_a_kind_and_its_options_in_any_order(good, override):
    both = [load_recipe(good, order) for order in (override, override[::-1])]
    assert both[0] == both[1] != load_recipe(good)
    (line,) = complaint(good, override[1:2])
    assert line.startswith(f"--set {override[1]}: ") and line.endswith("does not, so leave it out")


@pytest.mark.parametrize(
    "override, part",
    [
        ("stages.kd.trainer.max_steps", "expected path=value"),
        ("=3", "expected path=value"),
        ("a..b=3", "expected path=value"),
        ("stages.kdd.trainer.max_steps=3", "'stages' has no entry 'kdd', only 'sft', 'kd'; did you mean 'kd'?"),
        ("stages.2.name=a", "'stages' has 2 entries, so there is no 2"),
        ("name.first=a", "has nothing inside"),
        ("seed=[1", "no valid YAML"),
        ("seed=x", "--set seed=x: seed: expected a number, found 'x'"),
        ("sede=1", "--set sede=1: sede: unknown key; did you mean 'seed'?"),
        ("capture.q=1", "--set capture.q=1: capture.q: unknown key"),
        ("stage.kd.weight=1", "--set stage.kd.weight=1: stage: unknown key; did you mean 'stages'?"),
        ("prompts.0.colums.prompt=q", "--set prompts.0.colums.prompt=q: prompts.0.colums: unknown key; did you mean"),
        ("stages.kd.trainer.lr=1e-3", "trainer.lr: unknown key; did you mean 'learning_rate'?"),
        ("student.adapter=LoRA", "'LoRA' is not one of 'none', 'lora' or 'qlora'; did you mean 'lora'?"),
    ],
)
def test_override_that_leads_nowhere_is_refused(good, override, part):
    assert part in complaint(good, [override])[0]

"""The quality bench: equal steps and prompts wherever arms are compared, and differences paired by seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.recipe.file import load_recipe
from tools.bench.students.quality import ARMS, NUM_FRESH, PAIRS, RECIPE, tables

ROOT = Path(__file__).parents[2]


def test_arms_after_kd_take_equal_steps_and_rounds_answer_as_many_prompts_as_the_teacher_did() -> None:
    recipe = load_recipe(ROOT / RECIPE)
    assert tuple(stage.name for stage in recipe.stages) == ARMS
    steps, asked = {}, {}
    for stage in recipe.stages:
        rounds = stage.rounds.count if stage.rounds else 1
        steps[stage.name] = stage.trainer.max_steps * rounds
        if stage.rounds:
            asked[stage.name] = stage.rounds.prompts * rounds
    assert steps["sft"] == steps["kd"]
    assert len({steps[arm] for arm in ARMS[2:]}) == 1
    assert len(set(asked.values())) == 1
    not_held_out = (1 - recipe.heldout.fraction) * sum(NUM_FRESH.values())
    assert max(asked.values()) == pytest.approx(not_held_out, rel=0.02), "as many as the teacher answered afresh"
    assert all(arm in ARMS and control in ARMS for arm, control in PAIRS)


def test_differences_are_taken_seed_by_seed() -> None:
    """Arms that differ by exactly 5 in every seed, far less than seeds differ, have an interval of width 0."""
    runs = [{"sft": {"mean score": value}, "kd": {"mean score": value + 5.0}} for value in (10.0, 30.0, 80.0)]
    text = tables(runs, ["sft", "kd"])
    assert "| kd - sft | +5 ± 0 |" in text
    assert "| sft | 40 ± 90 |" in text  # 4.303 x 36.06 / sqrt(3) = 89.6
    assert "one" not in text

"""Schedules of weights and temperatures: their values by their formulas, and what each kind needs."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from shared.recipe.recipe import Schedule, Stage


@pytest.mark.parametrize("kind, expected", [("linear", 0.75), ("cosine", 0.5 + 0.5 * math.cos(math.pi / 4))])
def test_schedule_value_follows_its_formula(kind, expected):
    schedule = Schedule(kind=kind, start=1.0, end=0.0)
    assert schedule.value(0.25) == pytest.approx(expected, abs=1e-12)
    assert (schedule.value(-1.0), schedule.value(0.0)) == (1.0, 1.0)
    assert schedule.value(1.0) == pytest.approx(schedule.value(7.0)) == pytest.approx(0.0, abs=1e-12)


def test_step_schedule_changes_at_its_places():
    schedule = Schedule(kind="step", values=(3.0, 2.0, 1.0), at=(0.25, 0.5))
    assert [schedule.value(progress) for progress in (0, 0.24, 0.25, 0.49, 0.5, 1)] == [3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "schedule, why",
    [
        ({"kind": "linear", "start": 1}, "a linear schedule needs it"),
        ({"kind": "constant"}, "a constant schedule needs it"),
        ({"kind": "constant", "start": 1, "end": 0}, "a constant schedule does not use it"),
        ({"kind": "step", "values": [1, 2]}, "2 values need 1 places to change, not 0"),
        ({"kind": "step", "values": [1, 2, 3], "at": [0.5, 0.4]}, "must ascend"),
        ({"kind": "step", "values": [1, 2], "at": [1.0]}, "less than 1"),
        ({"kind": "sine", "start": 1}, "'constant', 'linear', 'cosine' or 'step'"),
    ],
)
def test_schedule_without_what_its_kind_needs_is_refused(schedule, why):
    with pytest.raises(ValidationError) as caught:
        Schedule.model_validate(schedule)
    assert why in str(caught.value)


def test_number_becomes_constant_schedule():
    stage = Stage.model_validate({"name": "kd", "losses": [{"name": "forward_kl", "weight": 1}]})
    assert stage.losses[0].weight == Schedule(kind="constant", start=1.0)
    assert stage.losses[0].weight.value(0.3) == 1.0

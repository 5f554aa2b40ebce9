"""Weights and temperatures over the steps of a stage."""

from __future__ import annotations

import math

import pytest

from shared.recipe.schedule import Schedule
from student_train.order.schedules import value


def test_linear_and_cosine_reach_both_ends_exactly():
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind=kind, start=2.0, end=0.5)
        assert value(schedule, 0, 11) == 2.0
        assert value(schedule, 10, 11) == pytest.approx(0.5, abs=1e-12)
        assert value(schedule, 5, 11) == pytest.approx(1.25)
    assert value(Schedule(kind="linear", start=2.0, end=0.5), 2, 11) == pytest.approx(1.7)
    assert value(Schedule(kind="cosine", start=2.0, end=0.5), 2, 11) == pytest.approx(
        1.25 + 0.75 * math.cos(0.2 * math.pi)
    )


def test_step_changes_where_it_says():
    schedule = Schedule(kind="step", values=(4.0, 2.0, 1.0), at=(0.25, 0.5))
    assert [value(schedule, step, 9) for step in range(9)] == [4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_constants_and_plain_numbers_never_change():
    assert {value(Schedule(kind="constant", start=0.9), step, 5) for step in range(5)} == {0.9}
    assert value(0.3, 7, 9) == 0.3


def test_stage_of_one_step_is_at_its_start_and_later_steps_keep_the_end():
    schedule = Schedule(kind="linear", start=1.0, end=0.0)
    assert value(schedule, 0, 1) == 1.0
    assert value(schedule, 50, 11) == 0.0


def test_impossible_steps_are_refused():
    for step, total_steps in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="steps count from 0"):
            value(1.0, step, total_steps)

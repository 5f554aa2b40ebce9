"""Handing out units to many engines: every unit once, engines never without, a killer set aside after its second
engine.
"""

from __future__ import annotations

import random

import pytest

from teacher_cache.cluster.unit_board import GENERATE, MIN_HELD, SCORE, UnitBoard, UnitTask


def units(count: int, kind: str = GENERATE, rows: int = 1024) -> list[UnitTask]:
    return [UnitTask(kind, f"part-00000000-{unit:06d}", unit, rows) for unit in range(count)]


def test_every_engine_gets_two_units_before_any_is_done_and_answers_come_first():
    board = UnitBoard(units(8), units(3, SCORE), 2)
    handed = [[board.take(engine) for engine in (0, 1)] for _ in range(MIN_HELD)]
    assert [task.unit for pair in handed for task in pair] == [0, 1, 2, 3]
    assert all(task.kind == GENERATE for pair in handed for task in pair)
    assert board.rows_left(GENERATE) == 8 * 1024 and board.pass_under_way == GENERATE


def test_small_parts_are_held_in_greater_number_and_the_rest_is_shared_out():
    board = UnitBoard(units(40, rows=256), [], 2)
    assert sum(board.take(0) is not None for _ in range(50)) == 6
    board = UnitBoard(units(4, rows=256), [], 2)
    assert sum(board.take(0) is not None for _ in range(50)) == MIN_HELD


def test_an_answered_unit_is_scored_and_the_board_ends_finished():
    board = UnitBoard(units(1), [], 1)
    answered = board.take(0)
    board.done(0, answered)
    assert not board.finished and board.pass_under_way == SCORE
    scored = board.take(0)
    assert (scored.kind, scored.stem, scored.unit) == (SCORE, answered.stem, answered.unit)
    board.done(0, scored)
    assert board.finished and board.take(0) is None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_every_unit_is_done_once_or_set_aside_after_two_deaths(seed):
    """Units 3 and 7 kill their engine in the second pass; engines also die at random."""
    rng = random.Random(seed)
    board = UnitBoard(units(12), [], 3)
    held: list[list[UnitTask]] = [[], [], []]
    done, deaths = [], dict.fromkeys(range(12), 0)
    random_deaths = 3
    while not board.finished:
        for engine in range(3):
            while (task := board.take(engine)) is not None:
                held[engine].append(task)
        engine = rng.choice([number for number in range(3) if held[number]])
        task = held[engine][0]
        poisoned = task.kind == SCORE and task.unit in (3, 7)
        if poisoned or (random_deaths and rng.random() < 0.1):
            random_deaths -= not poisoned
            for lost in board.died(engine, f"death at {task.unit}"):
                deaths[lost.unit] += 1
            held[engine].clear()
        else:
            held[engine].remove(task)
            board.done(engine, task)
            done.append((task.kind, task.unit))
    aside = {(task.kind, task.unit) for task, _ in board.set_aside}
    assert {(SCORE, 3), (SCORE, 7)} <= aside and len(done) == len(set(done)) and not aside & set(done)
    wanted = {(kind, unit) for kind in (GENERATE, SCORE) for unit in range(12)}
    assert wanted - aside - set(done) == {(SCORE, unit) for kind, unit in aside if kind == GENERATE}
    assert all(cause == f"death at {task.unit}" for task, cause in board.set_aside)


def test_bystanders_of_a_killer_are_done_after_it_alone():
    board = UnitBoard(units(3, SCORE), [], 1)
    board.take(0), board.take(0)
    assert [task.unit for task in board.died(0, "killed by 0")] == [0, 1]
    order = []
    while (task := board.take(0)) is not None:
        order.append(task.unit)
        assert board.take(0) is None, "a suspect, or the last unit, is alone"
        if task.unit == 0:
            board.died(0, "killed by 0 again")
        else:
            board.done(0, task)
    assert order == [2, 0, 1]
    assert [(task.unit, cause) for task, cause in board.set_aside] == [(0, "killed by 0 again")]

"""Windows of parts: rows of few parts at a time, each as often as without; parts are fetched before they are read."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from student_train.batch.part_prefetch import PartPrefetch
from student_train.order.order import StageRows, Windows, plan_epoch
from student_train.order.round_order import RoundPlanner
from student_train.order.stage_plan import StagePlan

PARTS = np.repeat(np.arange(12, dtype=np.int32), 50)
LENGTHS = np.random.default_rng(0).integers(5, 60, len(PARTS)).astype(np.int32)
SOURCES = (np.arange(len(PARTS)) % 3).astype(np.int32)


def plan(epoch=0, size=4, seed=3, mixture=None, windows=True):
    chosen = Windows(PARTS, size) if windows else None
    return plan_epoch(StageRows(seed, LENGTHS, SOURCES, 128, windows=chosen), epoch, mixture)


@pytest.mark.parametrize("size", [1, 4, 5, 100])
@pytest.mark.parametrize("mixture", [None, {0: 0.6, 1: 0.4}])
def test_a_window_reads_only_its_parts_and_the_epoch_draws_the_same_rows(size, mixture):
    found, whole = plan(size=size, mixture=mixture), plan(windows=False, mixture=mixture)
    np.testing.assert_array_equal(np.sort(found.rows), np.sort(whole.rows))
    assert (found.num_tokens, found.num_cut) == (whole.num_tokens, whole.num_cut)
    spans = []
    for part in range(12):
        packs = [pack for pack in range(found.num_packs) if part in PARTS[found.pack(pack)]]
        spans.append((min(packs), max(packs)))
    for pack in range(found.num_packs):  # no more parts are between their first and their last pack than a window has
        assert sum(start <= pack <= end for start, end in spans) <= size


def test_windows_differ_by_epoch_and_seed_and_repeat_themselves():
    first = plan()
    assert first.hash == plan().hash
    assert len({first.hash, plan(epoch=1).hash, plan(seed=4).hash, plan(size=3).hash, plan(windows=False).hash}) == 5


def test_rows_are_shuffled_within_a_window_and_one_window_is_no_window_but_for_ties():
    found = plan(size=12)
    np.testing.assert_array_equal(found.rows, plan(windows=False).rows)
    halves = PARTS[plan(size=6).rows]
    assert len(np.unique(halves[: len(halves) // 3])) == 6


def test_scheduled_rounds_take_each_source_window_after_window():
    def rows(windows):
        planner = RoundPlanner(StageRows(3, LENGTHS, SOURCES, 128, windows=windows), (0, 1, 2))
        return planner.next_round({0: 1.0, 1: 1.0, 2: 1.0}, planner.packs_per_epoch // 4).rows, planner.hash

    drawn, name = rows(Windows(PARTS, 3))
    assert all(len(np.unique(PARTS[drawn[SOURCES[drawn] == source]])) <= 6 for source in range(3))
    assert all(len(np.unique(PARTS[rows(None)[0][SOURCES[rows(None)[0]] == source]])) > 8 for source in range(3))
    assert name != rows(None)[1]


def test_parts_are_asked_for_before_the_packs_that_need_them():
    epochs = (plan(epoch=0), plan(epoch=1))
    stage = StagePlan(epochs, sum(epoch.num_packs for epoch in epochs), 1, 128, 3)
    fetched: list[int] = []
    added = threading.Condition()

    def fetch(part: int) -> None:
        with added:
            fetched.append(part)
            added.notify_all()

    ahead = PartPrefetch(stage, PARTS, 4, fetch, np.ones(12, np.int64), 100)
    needed: set[tuple[int, int]] = set()
    for index in range(stage.num_packs):
        ahead.reached(index)
        epoch, pack = stage.place_of(index)
        needed |= {(epoch, part) for part in PARTS[epochs[epoch].pack(pack)].tolist()}
        wanted = min(len(needed) + 4, 24)
        with added:
            assert added.wait_for(lambda wanted=wanted: len(fetched) >= wanted, timeout=60)
            assert len(fetched) == wanted
            assert {part for _, part in needed} <= set(fetched)
    assert sorted(fetched) == sorted([*range(12), *range(12)])


def asked_at(index, bound_bytes, num_ahead=4):
    """Parts that are fetched where training begins with the stage's pack `index`."""
    epochs = (plan(epoch=0), plan(epoch=1))
    stage = StagePlan(epochs, sum(epoch.num_packs for epoch in epochs), 1, 128, 3)
    ahead = PartPrefetch(stage, PARTS, num_ahead, lambda part: None, np.full(12, 10, np.int64), bound_bytes)
    ahead.reached(index)
    return {part for _, part in ahead._asked}, epochs[0]


@pytest.mark.parametrize("bound_bytes", [40, 55, 1000])
def test_no_more_is_fetched_ahead_than_is_kept_beside_the_parts_being_read(bound_bytes):
    epoch = asked_at(0, 1000)[1]
    for index in range(0, epoch.num_packs // 2, 7):
        asked, _ = asked_at(index, bound_bytes)
        seen, coming = PARTS[epoch.rows[: epoch.offsets[index + 1]]], PARTS[epoch.rows[epoch.offsets[index] :]]
        being_read = set(seen.tolist()) & set(coming.tolist())
        assert being_read <= asked
        assert len(asked - being_read) == min(4, max(0, bound_bytes // 10 - len(being_read)))


def test_a_resumed_epoch_fetches_nothing_that_it_has_read_already():
    _, epoch = asked_at(0, 1000)
    index = epoch.num_packs - 1
    asked, _ = asked_at(index, 1000, num_ahead=0)
    assert asked == set(PARTS[epoch.pack(index)].tolist())

"""Reading ahead changes when packs are read, never which ones; the time spent waiting for them is written down."""

from __future__ import annotations

import threading

import pytest

from student_train.records.metrics_log import read_steps
from student_train.stage.stages import run_stages
from student_train.train.read_ahead import NUM_AHEAD, ReadAhead


class Numbers:
    """A dataset of its own indices, which remembers who read what."""

    def __init__(self, length: int) -> None:
        self.length, self.reads = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index == 13:
            raise ValueError("damaged")
        self.reads.append((index, threading.current_thread().name))
        return index


@pytest.mark.parametrize(("batch", "processes", "rank"), [(1, 1, 0), (2, 3, 0), (2, 3, 2), (4, 2, 1)])
def test_items_of_one_process_are_read_once_and_in_the_thread_but_the_first(batch, processes, rank):
    numbers = Numbers(12)
    ahead = ReadAhead(numbers, batch, processes)
    wanted = [i for i in range(12) if i // batch % processes == rank]
    assert [ahead[i] for i in wanted] == wanted
    ahead.close()
    assert sorted(index for index, _ in numbers.reads) == wanted
    assert [index for index, name in numbers.reads if not name.startswith("read-ahead")] == wanted[:1]


def test_unexpected_item_is_read_at_once_and_what_was_ahead_is_forgotten():
    numbers = Numbers(100)
    ahead = ReadAhead(numbers, 1, 1)
    assert [ahead[0], ahead[50], ahead[51]] == [0, 50, 51]
    assert set(ahead._pending) == set(range(52, 52 + NUM_AHEAD))
    ahead.close()


def test_failure_is_raised_where_the_item_is_asked_for():
    ahead = ReadAhead(Numbers(20), 1, 1)
    assert ahead[12] == 12
    with pytest.raises(ValueError, match="damaged"):
        ahead[13]
    ahead.close()


@pytest.mark.slow
def test_wait_for_data_is_in_the_timing_and_in_the_last_line(recipe_of, capfd):
    recipe = recipe_of(trainer={"max_steps": 3})
    run_stages(recipe)
    steps = read_steps(recipe.output_dir / "train/kd/timing.jsonl")
    assert all(0 < step["waited_seconds"] < step["seconds"] for step in steps)
    share = sum(step["waited_seconds"] for step in steps) / sum(step["seconds"] for step in steps)
    assert f"waited for data in {share:.2%} of the steps' time" in capfd.readouterr().err

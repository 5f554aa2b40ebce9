"""The writer thread: order, bound, failure."""

from __future__ import annotations

import threading

import pytest

from teacher_cache.passes.unit_writer import UnitWriter


def test_writes_run_in_order_and_are_awaited():
    done: list[int] = []
    with UnitWriter() as writer:
        for i in range(20):
            writer.submit(lambda i=i: done.append(i))
    assert done == list(range(20))


def test_a_full_queue_makes_the_producer_wait():
    gate, started = threading.Event(), threading.Event()
    submitted: list[int] = []

    def produce() -> None:
        with UnitWriter(max_waiting=1) as writer:
            for i in range(4):
                writer.submit(lambda: (started.set(), gate.wait(10)))
                submitted.append(i)

    thread = threading.Thread(target=produce)
    thread.start()
    assert started.wait(10)
    thread.join(0.1)
    assert len(submitted) <= 2
    gate.set()
    thread.join(10)
    assert submitted == [0, 1, 2, 3]


def test_a_failure_reaches_the_producer_and_never_blocks_it():
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space")

    def produce() -> None:
        with UnitWriter(max_waiting=1) as writer:
            writer.submit(fail)
            for i in range(1000):
                writer.submit(lambda i=i: done.append(i))

    with pytest.raises(OSError, match="no space"):
        produce()
    assert done == []


def test_a_failure_of_the_last_write_is_raised_at_the_end():
    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), UnitWriter() as writer:
        writer.submit(fail)


def test_an_error_in_the_producer_keeps_its_own_cause():
    gate = threading.Event()
    done: list[int] = []

    def produce() -> None:
        with UnitWriter() as writer:
            writer.submit(lambda: gate.wait(10))
            writer.submit(lambda: done.append(1))
            threading.Timer(0.05, gate.set).start()
            raise ValueError("the engine died")

    with pytest.raises(ValueError, match="the engine died"):
        produce()
    assert done == []


def test_waiting_for_a_place_and_for_the_last_writes_is_counted_apart():
    gate = threading.Event()
    threading.Timer(0.2, gate.set).start()
    with UnitWriter(max_waiting=1) as writer:
        for _ in range(3):
            writer.submit(lambda: gate.wait(10))
        assert writer.seconds_full > 0
        assert writer.seconds_draining == 0
        full = writer.seconds_full
        writer.submit(lambda: threading.Event().wait(0.05))
    assert writer.seconds_draining > 0
    assert writer.seconds_full < full + 0.04

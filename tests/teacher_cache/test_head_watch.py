"""The head of a Ray cluster that goes away is named before Ray ends the process, once each time."""

from __future__ import annotations

import socket

import pytest

from teacher_cache.cluster import head_watch
from teacher_cache.cluster.head_watch import GONE_SECONDS, PAUSE_SECONDS, HeadWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(head_watch, "time", clock)
    return clock


def looked(watch: HeadWatch, clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds / 0.5)):
        clock.now += 0.5
        watch.look()


def test_a_head_that_goes_away_comes_back_and_goes_again_is_said_each_time_once(clock, caplog):
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        watch = HeadWatch(f"127.0.0.1:{port}")
        looked(watch, clock, 3 * GONE_SECONDS)
    assert not caplog.records
    looked(watch, clock, GONE_SECONDS - PAUSE_SECONDS - 1)
    assert not caplog.records, "a head that is started anew is away for some seconds"
    looked(watch, clock, 3 * GONE_SECONDS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    said = caplog.records[0].getMessage()
    assert f"127.0.0.1:{port} does not answer" in said and "then the same command continues" in said
    with socket.create_server(("127.0.0.1", port)):
        looked(watch, clock, 2 * PAUSE_SECONDS)
    looked(watch, clock, 2 * GONE_SECONDS)
    assert len(caplog.records) == 2


def test_it_is_said_well_before_ray_ends_the_process():
    assert GONE_SECONDS + 2 * PAUSE_SECONDS + 2 < 60


def test_an_address_that_cannot_be_asked_says_nothing(clock, caplog):
    looked(HeadWatch("here"), clock, 3 * GONE_SECONDS)
    assert not caplog.records

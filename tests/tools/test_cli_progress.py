"""Progress: plain lines at a readable pace, rates and time left from a clock that the test owns."""

from __future__ import annotations

import io

import pytest

from shared.progress import BuildProgress, Progress, duration


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_come_at_intervals_with_rate_and_time_left():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("score", 100, stream=stream, clock=clock)
    for _ in range(40):
        clock.now += 0.5
        progress.advance(1, 50)
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "score: 0 of 100 rows"
    assert lines[1] == "score: 10 of 100 rows, 100 tokens/s, 45 s left"
    assert len(lines) == 1 + 4 + 1
    assert lines[-1] == "score: 40 of 100 rows, 100 tokens/s, 20 s"


def test_time_left_counts_only_what_this_run_did():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("train kd", 100, unit="steps", done=80, stream=stream, clock=clock)
    clock.now += 10
    progress.advance(10)
    assert progress.line() == "train kd: 90 of 100 steps, 10 s left"


def test_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("score", 10, stream=stream) as progress:
        progress.advance(10, 5)
        progress.note("a line")
    assert "score: 100%" in stream.getvalue()
    assert "a line" in stream.getvalue()


def test_phases_of_a_build_follow_each_other(capsys):
    progress = BuildProgress()
    progress.advance(1, 1)
    progress.start("list", 0)
    progress.advance(5, 0)
    progress.start("score", 5)
    progress.finish()
    progress.finish()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "list: 0 rows", "list: 5 rows", "score: 0 of 5 rows", "score: 0 of 5 rows",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seconds, text", [(0, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min")]
)
def test_duration_is_short(seconds, text):
    assert duration(seconds) == text


def test_a_training_line_says_loss_and_learning_rate():
    stream = io.StringIO()
    progress = Progress("train kd", 10, unit="steps", stream=stream, clock=iter(range(0, 100, 6)).__next__)
    progress.advance(1, 60, "loss 1.2500, learning rate 1.00e-03")
    assert stream.getvalue().splitlines()[-1].endswith("left, loss 1.2500, learning rate 1.00e-03")

"""Model processes that are forked do, say and end as those that are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.errors import EvaluationError
from tests.system.program import ROOT
from tools.evaluate.models import forked_process
from tools.evaluate.models.forked_process import Forks
from tools.evaluate.models.model_process import run_in_process

WORK = "tests.tools.evaluate.forked_work"


@pytest.fixture(scope="module")
def forks():
    with Forks("transformers") as found:
        yield found


def test_a_forked_process_works_as_one_that_was_started(forks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    started, forked, again = (
        run_in_process(WORK, {}, tmp_path / str(number), "one", said.append, 2, used)
        for number, used in enumerate((None, forks, forks))
    )
    assert (started["parent"], started["imported"]) == (os.getpid(), False)
    assert forked["imported"] and again["parent"] == forked["parent"] != os.getpid()
    for found in (started, forked, again):
        assert (found["cwd"], found["threads"], found["sockets"]) == (str(tmp_path), 2, 0)
    assert [(tmp_path / str(number)).read_text() for number in range(3)] == ["to the log\n"] * 3
    assert len(said) == len(set(said)) == 3


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"die": signal.SIGKILL}, "ended with status -9: to the log"),
        ({"raise": "no such thing"}, "ended with status 1: RuntimeError: no such thing"),
    ],
)
def test_the_end_of_a_forked_process_is_told_as_of_one_that_was_started(forks, tmp_path, job, says):
    for used in (None, forks):
        with pytest.raises(EvaluationError, match=says):
            run_in_process(WORK, job, tmp_path / "log", "one", lambda line: None, forks=used)
    assert run_in_process(WORK, {}, tmp_path / "log", "one", lambda line: None, forks=forks)["imported"]


def test_several_are_forked_at_the_same_time(forks, tmp_path):
    def run(number: int) -> int:
        return run_in_process(WORK, {}, tmp_path / str(number), "one", lambda line: None, 1, forks)["threads"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(12))) == [1] * 12


def test_nothing_is_forked_for_an_engine_with_processes_of_its_own_or_beside_a_gpu(tmp_path, monkeypatch):
    with (tmp_path / "log").open("wb") as log:
        assert Forks("vllm").start(WORK, log, None) is None
        monkeypatch.setattr(forked_process, "list_gpus", lambda: [("NVIDIA H200", (9, 0))])
        assert Forks("transformers").start(WORK, log, None) is None


PARENT = """
import sys, threading, time
from pathlib import Path
from tools.evaluate.models.forked_process import Forks
with Forks("transformers") as forks, open(sys.argv[1], "wb") as log:
    process = forks.start("tests.tools.evaluate.forked_work", log, 1)
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_no_process_stays_where_the_one_that_evaluates_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    forked = Path("/proc", parent.stdout.readline().strip())
    server = Path("/proc", (forked / "stat").read_text().rpartition(")")[2].split()[1])
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while (forked.exists() or server.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not forked.exists()
    assert not server.exists()

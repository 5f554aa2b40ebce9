"""A process that watches its starter: ends with it however it ended, is not fooled by a reused id, and takes its core
along.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.process import parent_watch
from tests.system.program import ROOT

WATCH = "from shared.process.parent_watch import end_with_parent; import time"
CHILD = f"{WATCH}; end_with_parent(); time.sleep(60)"
PARENT = f"""
import subprocess, sys, time
from shared.process.parent_watch import announced
with announced():
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
# A worker of a core: spawned by multiprocessing, so its parent is the core and not the process that was announced.
CORE = """
import multiprocessing, os, sys, time
from shared.process.parent_watch import end_with_parent
def work():
    end_with_parent()
    time.sleep(60)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    print(os.getpid(), worker.pid, flush=True)
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc, as vLLM's workers have it")


def ended(pid: int) -> bool:
    bound = time.monotonic() + 30
    while parent_watch.started_at(pid) is not None and time.monotonic() < bound:
        time.sleep(0.05)
    return parent_watch.started_at(pid) is None


def start(source: str | Path, **environment: str) -> subprocess.Popen:
    words = [str(source)] if isinstance(source, Path) else ["-c", source]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("waits", [True, False], ids=["reaped", "left as a zombie"])
def test_child_ends_with_a_killed_parent(waits):
    parent = start(PARENT)
    child = int(parent.stdout.readline())
    assert parent_watch.started_at(child) is not None
    parent.kill()
    if waits:
        parent.wait()
    assert ended(child)
    parent.wait()


def test_process_whose_announced_parent_is_another_by_now_ends():
    """Its id was given again: another start time stands for another process."""
    orphan = start(CHILD, DECANT_PARENT=f"{os.getpid()} 1")
    orphan.wait(timeout=30)
    assert orphan.returncode == -9


def test_worker_ends_the_core_whose_starter_is_gone(tmp_path):
    (tmp_path / "core.py").write_text(CORE)
    starter = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    announced = f"{starter.pid} {parent_watch.started_at(starter.pid)}"
    core = start(tmp_path / "core.py", DECANT_PARENT=announced)
    pids = [int(word) for word in core.stdout.readline().split()]
    time.sleep(1.0)
    assert core.poll() is None
    starter.kill()
    starter.wait()
    assert core.wait(timeout=30) == -9
    assert all(ended(pid) for pid in pids)


def test_nothing_is_watched_inside_the_process_that_started_the_engine(monkeypatch):
    assert parent_watch.end_with_parent() is None
    with parent_watch.announced():
        assert parent_watch.end_with_parent() is None
    assert parent_watch.VARIABLE not in os.environ

"""End a process with the process that started it, however that one ended.

A phase of `decant run` would go on after `kill -9` of the run, and vLLM's core, which has no watch on its parent, would
wait for requests for ever and hold the GPU, so that the same command could not start again. The starter writes its
process id and start time into the environment that its children inherit; a child starts a thread that looks twice a
second whether that very process still lives. An id that was given to another process since has another start time, and
a process that ended without being waited for counts as ended. A worker process of vLLM takes its core along.
Cost: one read of /proc per half second and process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "DECANT_PARENT"
SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def announced() -> Iterator[None]:
    """Let the processes that are started meanwhile know this one as the one to end with."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = f"{os.getpid()} {started_at(os.getpid()) or 0}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def end_with_parent() -> threading.Thread | None:
    """Start the watch, where a parent was announced that is not this process itself."""
    pid, ticks = (int(word) for word in os.environ.get(VARIABLE, "0 0").split())
    if (
        ticks == 0 or pid == os.getpid()
    ):  # nothing announced, no /proc here, or a core inside the process that started it
        return None
    above = multiprocessing.parent_process()
    core = None
    if above is not None and above.pid is not None and above.pid != pid:  # a worker process, whose parent is the core
        core = (above.pid, started_at(above.pid))
    thread = threading.Thread(target=_watch, args=(pid, ticks, core), name="decant-parent-watch", daemon=True)
    thread.start()
    del os.environ[VARIABLE]  # whom this process starts ends with this process
    return thread


def started_at(pid: int) -> int | None:
    """Return a process's start in clock ticks since boot, or None where it has ended; `started_at(1)` -> 3."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if state in "ZX" else int(fields[18])


def _watch(pid: int, ticks: int, core: tuple[int, int | None] | None) -> None:
    while started_at(pid) == ticks:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if core is not None and core[1] is not None and started_at(core[0]) == core[1]:
        os.kill(core[0], signal.SIGKILL)  # its other workers end with it
    os.kill(os.getpid(), signal.SIGKILL)

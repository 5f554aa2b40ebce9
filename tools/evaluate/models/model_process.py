"""A process for each model: engines leave processes and memory behind, so it is killed as a whole.

The child reads its job as one line of JSON from stdin, which stays open: the child dies with it, and so with its
parent. It writes progress and at last what it made or an error to stdout, one JSON object per line; what libraries
print goes to its log. `serve` is the child's side of that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from shared.errors import DecantError, EvaluationError
from tools.evaluate.models.forked_process import Forks
from tools.evaluate.sandbox.fork_server import Forked
from tools.own_process import own_command, own_environment

_running: set[subprocess.Popen[bytes] | Forked] = set()
"""The children that run, in whichever thread."""


def run_in_process(
    module: str,
    job: Mapping[str, Any],
    log: Path,
    name: str,
    say: Callable[[str], None],
    threads: int | None = None,
    forks: Forks | None = None,
) -> Any:
    """Run `python -m module` on a job to its end and return what it made, as JSON has it; `say` gets its progress;
    `threads` as the libraries decide if None.

    Raises:
        EvaluationError: it failed; the sentence is its own, or names its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        forked = None if forks is None else forks.start(module, stream, threads)
        process = forked or subprocess.Popen(  # noqa: S603 - our own interpreter
            own_command("-m", module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=own_environment() | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            start_new_session=True,
        )
        _running.add(process)
        try:
            said = _follow(process, json.dumps(job), name, say)
        finally:
            _running.discard(process)
            _end(process)
    if "error" in said:
        raise EvaluationError(f"'{name}' cannot be evaluated: {said['error']}")
    if process.returncode != 0 or "made" not in said:
        raise EvaluationError(
            f"evaluating '{name}' ended with status {process.returncode}: {_last_line(log)}; its log is {log}"
        )
    return said["made"]


def end_running() -> None:
    """Kill the children that other threads wait for."""
    for process in list(_running):
        process.kill()


def serve(work: Callable[[dict[str, Any], Callable[[str], None]], Any]) -> NoReturn:
    """Be the child: read the job, let `work` do it, send what it made through the progress pipe, and end at once: an
    engine's threads must not keep a finished process alive.
    """
    progress = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        _send(progress, {"made": work(job, lambda line: _send(progress, {"progress": line}))})
        status = 0
    except DecantError as error:
        _send(progress, {"error": str(error)})
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow(
    process: subprocess.Popen[bytes] | Forked, job: str, name: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Send the job, pass progress on, return the last word; stdin stays open: the child dies with it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        process.wait()
        return {}
    said: dict[str, Any] = {}
    for line in process.stdout:
        said = json.loads(line)
        if "progress" not in said:
            break
        say(f"{name}: {said['progress']}")
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
    return said


def _end(process: subprocess.Popen[bytes] | Forked) -> None:
    """Kill whatever is left of the model's process group: engines leave workers behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all gone already, as it should be, or not yet a group of its own
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = [line for line in stream.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _send(progress: TextIO, message: dict[str, Any]) -> None:
    progress.write(json.dumps(message) + "\n")
    progress.flush()


def _die_with_parent() -> None:
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)

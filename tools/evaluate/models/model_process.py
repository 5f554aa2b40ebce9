"""A process for each model: engines leave processes and memory behind, so it is killed as a whole.

The child reads its job as one line of JSON from stdin, which stays open: the child dies with it, and so with its
parent. It writes progress and at last `done` or `error` to stdout, one JSON object per line; what libraries print goes
to its log. `serve` is the child's side of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from shared.errors import DecantError, EvaluationError
from tools.own_process import own_command, own_environment

_running: set[subprocess.Popen[bytes]] = set()
"""The children that run, in whichever thread."""


def run_in_process(
    module: str,
    job: Mapping[str, Any],
    log: Path,
    name: str,
    say: Callable[[str], None],
    threads: int | None = None,
) -> None:
    """Run `python -m module` on a job to its end; `say` gets its progress; `threads` as the libraries decide if None.

    Raises:
        EvaluationError: it failed; the sentence is its own, or names its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            own_command("-m", module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=own_environment() | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            start_new_session=True,
        )
        _running.add(process)
        try:
            error = _follow(process, json.dumps(job), name, say)
        finally:
            _running.discard(process)
            _end(process)
    if error is not None:
        raise EvaluationError(f"'{name}' cannot be evaluated: {error}")
    if process.returncode != 0:
        raise EvaluationError(
            f"evaluating '{name}' ended with status {process.returncode}: {_last_line(log)}; its log is {log}"
        )


def end_running() -> None:
    """Kill the children that other threads wait for."""
    for process in list(_running):
        process.kill()


def serve(work: Callable[[dict[str, Any], Callable[[str], None]], None]) -> int:
    """Be the child: read the job, let `work` do it, report on the progress pipe; 0 when it was done."""
    progress = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        work(job, lambda line: _send(progress, {"progress": line}))
    except DecantError as error:
        _send(progress, {"error": str(error)})
        return 1
    _send(progress, {"done": True})
    return 0


def leave(status: int) -> None:
    """End the child at once: an engine's threads must not keep a finished process alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow(process: subprocess.Popen[bytes], job: str, name: str, say: Callable[[str], None]) -> str | None:
    """Send the job, pass progress on, return the sentence of an error; stdin stays open: the child dies with it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        process.wait()
        return None
    error = None
    for line in process.stdout:
        message = json.loads(line)
        if "progress" in message:
            say(f"{name}: {message['progress']}")
        if message.get("done"):
            break
        error = message.get("error", error)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
    return error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the model's process group: engines leave workers behind."""
    with contextlib.suppress(ProcessLookupError):  # all gone already, as it should be
        os.killpg(process.pid, signal.SIGKILL)
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

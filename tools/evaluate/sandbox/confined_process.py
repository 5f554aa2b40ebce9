"""One confined interpreter to its end: give it its job, read what it says, stop it at its limits, see it gone.

Several that talk with each other are watched together; the first is the one that is waited for. Everything that a
program sends is
compared and cut, never parsed. Cost: one poll per 50 ms and per chunk of output.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from tools.evaluate.sandbox import scratch_directory
from tools.evaluate.sandbox.fork_server import Forked
from tools.evaluate.sandbox.interpreter import START_SECONDS

_TICK_SECONDS = 0.05
_WALL_PER_CPU = 3.0
"""Wall seconds allowed per second of processor time, so that a busy machine does not decide who passes."""
_LINGER_SECONDS = 0.5
"""How long the others may take to end after the first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0
    """Processor time; three times as much wall time after the start."""
    memory_bytes: int = 512 << 20
    """Address space."""
    file_bytes: int = 8 << 20
    """Any one file, and four times that for all files together."""
    num_files: int = 256
    """Files and directories in its directory."""
    output_bytes: int = 1 << 20
    """Standard output and error together."""


Launch = Callable[[Path, Sequence[int]], tuple[subprocess.Popen[bytes] | Forked, int | None]]
"""Starts a process in a directory that has these descriptors; returns it, and of bubblewrap the descriptor of the
process whose end is the end of everything in its walls."""


@dataclass(slots=True)
class Confined:
    """A running program and what was heard of it."""

    process: subprocess.Popen[bytes] | Forked
    scratch: Path
    verdict_fd: int
    nonce: str
    reaper: int | None
    """As `Launch` returns it."""
    output: bytes = b""
    """The first that it printed."""
    num_output_bytes: int = 0
    message: bytes = b""
    """What came through the verdict's pipe."""

    @classmethod
    def start(cls, launch: Launch, job: Mapping[str, Any], scratch: Path, pipes: Sequence[int]) -> Confined:
        """Launch a process of the child's script, give it the verdict's descriptor, `pipes` and the job.

        Raises:
            EvaluationError: it cannot be started.
        """
        nonce = secrets.token_hex(16)
        verdict_fd, child_fd = os.pipe()
        try:
            process, reaper = launch(scratch, (child_fd, *pipes))
        except EvaluationError:
            os.close(verdict_fd)
            raise
        finally:
            os.close(child_fd)
        _send(process, json.dumps({**job, "nonce": nonce}).encode("utf-8", errors="replace"))
        return cls(process, scratch, verdict_fd, nonce, reaper)

    def stop(self) -> None:
        """Kill what still runs and return when nothing of it is left."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
        self.process.wait()
        if self.reaper is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.reaper, signal.SIGKILL)
            select.select([self.reaper], [], [], START_SECONDS)
            os.close(self.reaper)
        os.close(self.verdict_fd)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def failure(self) -> str | None:
        """Return what it died of, empty where it came to its end, None where it did not say; call after `stop`.

        Raises:
            EvaluationError: its walls could not be put up, so it did not run.
        """
        nonce, _, failure = self.message.decode("utf-8", errors="replace").partition("\n")
        if nonce == self.nonce:  # without the space that is sent when the walls are up
            raise EvaluationError(f"the sandbox could not confine a program and did not run it: {failure}")
        return failure if nonce == f" {self.nonce}" else None

    def death(self) -> str:
        """Return how it ended without a verdict, in a few words; call after `stop`."""
        status = self.process.wait()
        if status == -signal.SIGXCPU or status == 128 + signal.SIGXCPU:
            return "ran out of processor time"
        if status < 0:
            return f"killed by signal {-status}"
        lines = self.output.decode("utf-8", errors="replace").strip().splitlines()
        return f"left without a verdict (status {status}) {lines[-1][:200] if lines else ''}".strip()


def watch(programs: Sequence[Confined], limits: Limits) -> str:
    """Read until the first program ends or one breaks a limit; return which limit, empty where none was broken."""
    with selectors.DefaultSelector() as selector:
        for program in programs:
            assert program.process.stdout is not None
            selector.register(program.process.stdout, selectors.EVENT_READ, (program, False))
            selector.register(program.verdict_fd, selectors.EVENT_READ, (program, True))
        deadline, next_look, last_look = time.monotonic() + START_SECONDS, 0.0, float("inf")
        started = False
        while (heard := {id(key.data[0]) for key in selector.get_map().values()}) and time.monotonic() < last_look:
            if id(programs[0]) not in heard:
                last_look = min(last_look, time.monotonic() + _LINGER_SECONDS)
            for key, _ in selector.select(_TICK_SECONDS):
                if not _read(key.fd, *key.data):
                    selector.unregister(key.fileobj)
            if not started and all(program.message for program in programs):
                started, deadline = True, time.monotonic() + _WALL_PER_CPU * limits.seconds
            if time.monotonic() > deadline:
                return "ran out of time"
            look = time.monotonic() > next_look
            next_look = time.monotonic() + _TICK_SECONDS if look else next_look
            for program in programs:
                if broken := _broken(program, limits, look):
                    return broken
    return ""


def _broken(program: Confined, limits: Limits, look: bool) -> str:
    if program.num_output_bytes > limits.output_bytes:
        return f"printed more than {limits.output_bytes} bytes"
    return scratch_directory.too_full(program.scratch, 4 * limits.file_bytes, limits.num_files) if look else ""


def _read(descriptor: int, program: Confined, is_verdict: bool) -> bool:
    """Take what is there; False at the end."""
    chunk = os.read(descriptor, 1 << 16)
    if is_verdict:
        program.message = (program.message + chunk)[: 1 << 14]
    else:
        program.num_output_bytes += len(chunk)
        program.output = (program.output + chunk)[: 1 << 12]
    return bool(chunk)


def _send(process: subprocess.Popen[bytes] | Forked, job: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return  # it died first; the missing verdict says so

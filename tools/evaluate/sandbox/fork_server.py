"""An interpreter that is started once and forks a process for each program, so that its imports are made once.

`sandbox_child.serve` is its other side. A forked process puts its own walls up, as one that was started for its
program does; the server itself reads nothing that a program writes. Only the server waits for its forks, and only when
it is asked to, so a process number stays that process's until then. Cost: 50 ms to start, about 5 ms a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from tools.evaluate.sandbox.interpreter import start_interpreter


class Forked:
    """A forked process, as far as `subprocess.Popen` is asked about one."""

    def __init__(self, server: ForkServer, pid: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb", buffering=0)
        self.returncode: int | None = None
        self._server, self._end = server, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return its status, None while it runs."""
        if self.returncode is None and select.select([self._end], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return its status once it has one: that of its exit, or minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it has none after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = self._server.ask(self.pid)
            os.close(self._end)
        return self.returncode

    def kill(self) -> None:
        """End it."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._end, signal.SIGKILL)


class ForkServer:
    """The server; threads may share it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._lock = channel, threading.Lock()

    @classmethod
    @contextlib.contextmanager
    def started(cls, command: Sequence[str]) -> Iterator[ForkServer]:
        """Start a command that ends in the child's script; the server and all its forks end with the block.

        Raises:
            EvaluationError: it cannot be started.
        """
        own, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with own:
            with childs:
                words = [*command, "--serve", str(os.getpid())]
                process, _ = start_interpreter(words, Path("/"), (childs.fileno(),))
            with process:
                try:
                    yield cls(own)
                finally:
                    process.kill()

    def fork(self, wanted: Any, descriptors: Sequence[int]) -> Forked:
        """Return a new process that becomes what is wanted, with stdin, output and then `descriptors` open.

        Raises:
            EvaluationError: the server is gone.
        """
        (childs_stdin, stdin), (stdout, childs_stdout) = os.pipe(), os.pipe()
        try:
            pid = self.ask(wanted, [childs_stdin, childs_stdout, *descriptors])
        except EvaluationError:
            os.close(stdin)
            os.close(stdout)
            raise
        finally:
            os.close(childs_stdin)
            os.close(childs_stdout)
        return Forked(self, pid, stdin, stdout)

    def ask(self, wanted: Any, descriptors: Sequence[int] = ()) -> int:
        """Return the number of a process forked for what is wanted, or the status of one that is named by its number.

        Raises:
            EvaluationError: the server is gone.
        """
        try:
            with self._lock:
                socket.send_fds(self._channel, [json.dumps(wanted).encode()], descriptors)
                return int(self._channel.recv(32))
        except (OSError, ValueError):
            raise EvaluationError(
                "the process that forks others ended, from outside or for want of memory; run the same command again"
            ) from None

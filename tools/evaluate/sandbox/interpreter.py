"""A process of `sandbox_child.py`, alone or in bubblewrap's walls. Cost: an interpreter's start."""

from __future__ import annotations

import os
import re
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path

from shared.errors import EvaluationError, refused

START_SECONDS = 20.0
"""Longest start of an interpreter on a busy machine, and longest end of a killed one."""


def start_interpreter(
    command: Sequence[str], scratch: Path, descriptors: Sequence[int]
) -> tuple[subprocess.Popen[bytes], int | None]:
    """Start a command that ends in the child's script, which gets the numbers of `descriptors`.

    Raises:
        EvaluationError: it cannot be started.
    """
    info_fd, child_info_fd = os.pipe()
    walls = ["--info-fd", str(child_info_fd)] if Path(command[0]).name == "bwrap" else []
    try:
        process = subprocess.Popen(  # noqa: S603 - confining it is what it is started for
            [command[0], *walls, *command[1:], *map(str, descriptors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            env={"PYTHONHASHSEED": "0"},
            pass_fds=(*descriptors, *([child_info_fd] if walls else [])),
            start_new_session=True,
        )
    except OSError as error:
        os.close(info_fd)
        raise EvaluationError(f"the sandbox could not start a program: {refused(error)}") from error
    finally:
        os.close(child_info_fd)
    reaper = _reaper(info_fd) if walls else None
    os.close(info_fd)
    return process, reaper


def _reaper(info_fd: int) -> int | None:
    """Return a descriptor of the process that bubblewrap names; None where it ended before."""
    text = b""
    while b"}" not in text:  # to its end, or writing the rest would be the end of bubblewrap
        ready, _, _ = select.select([info_fd], [], [], START_SECONDS)
        chunk = os.read(info_fd, 1 << 12) if ready else b""
        if not chunk:
            break
        text += chunk
    found = re.search(rb'"child-pid":\s*(\d+)', text)
    try:
        return os.pidfd_open(int(found.group(1))) if found else None
    except ProcessLookupError:
        return None

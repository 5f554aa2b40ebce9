"""Functions in real processes that start at once and can be killed: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import TrainingError


class Forked:
    """Runs one function after another, each in a process of its own."""

    def __init__(self, *modules: str) -> None:
        """Start the process that imports the modules and forks."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch._dynamo", "transformers.trainer", *modules])

    def run(
        self,
        log: Path,
        function: Callable[..., None],
        *arguments: Any,
        kill_when: Callable[[], bool] | None = None,
    ) -> bool:
        """Call a function, its output at the end of `log`, until it ends or `kill_when` says so; return whether it was
        killed.

        Raises:
            TrainingError: it failed by itself.
        """
        process = self._context.Process(target=_call, args=(str(log), function, arguments))
        process.start()
        while kill_when is not None and process.is_alive():
            if kill_when():
                process.kill()
                break
            time.sleep(0.001)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return True
        if process.exitcode:
            raise TrainingError(f"a process ended with exit code {process.exitcode}; its output is in {log}")
        return False


def _call(log: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    function(*arguments)

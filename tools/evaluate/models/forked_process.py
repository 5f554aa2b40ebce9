"""Forks model processes from one that has made their imports, which take longer than all else that a small model does.

The process that is forked imports and computes nothing, so a child finds no thread of a library's that stayed behind.
It is not used for vLLM, which reads its settings when it is imported, nor beside a GPU, whose driver no fork survives.
`python -m` of this module is that process. Cost: 4 s of imports once, then 20 ms for each model instead of them.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from shared.models.gpus import list_gpus
from shared.recipe.sections.teacher import is_one_process
from tools.evaluate.sandbox.fork_server import Forked, ForkServer
from tools.evaluate.sandbox.sandbox_child import serve
from tools.own_process import own_command, own_environment


class Forks:
    """Starts model processes of one engine; the process that is forked starts with the first; threads may share it."""

    def __init__(self, engine: str) -> None:
        """Take the engine that the models run in."""
        self._can_fork = is_one_process(engine) and not list_gpus()
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._ends = ExitStack()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *raised: object) -> None:
        self._ends.close()

    def start(self, module: str, log: IO[bytes], threads: int | None) -> Forked | None:
        """Start `python -m module`, whose stderr is `log`; None where such a process is to be started as any other.

        Raises:
            EvaluationError: the process that is forked is gone.
        """
        if not self._can_fork:
            return None
        with self._lock:
            if self._server is None:
                self._server = self._started(log)
            return self._server.fork({"module": module, "threads": threads, "cwd": str(Path.cwd())}, [log.fileno()])

    def _started(self, log: IO[bytes]) -> ForkServer:
        own, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends.enter_context(own)
        with childs:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter
                own_command("-m", "tools.evaluate.models.forked_process", str(childs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_environment(),
                pass_fds=(childs.fileno(),),
                start_new_session=True,
            )
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        return ForkServer(own)


def _become(wanted: Any, descriptors: list[int], forked_by: int) -> None:
    """Be the process of one model, with these descriptors as stdin, stdout and stderr."""
    try:
        os.setsid()
        for place, descriptor in enumerate(descriptors):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.chdir(wanted["cwd"])
        if wanted["threads"] is not None:
            import torch

            os.environ["OMP_NUM_THREADS"] = str(wanted["threads"])
            torch.set_num_threads(wanted["threads"])
        sys.argv = [wanted["module"]]
        runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)
    except BaseException:  # noqa: BLE001 - as an interpreter ends: its log says why
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    from shared.models.large_imports import import_transformers

    import_transformers()
    serve(int(sys.argv[1]), _become)

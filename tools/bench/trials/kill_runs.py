"""Builds that can be killed: forked from a process that has imported everything, or the program as a user starts it.

Forking saves the seconds of importing torch, so that a hundred kills take minutes; what is killed is a process that
runs the real build from its first step. Nothing in the forking process may start threads, so caches are judged in
children too. Processes of the program are found by a mark in their environment, which everything that they start
inherits.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tools.own_process import own_command, own_environment

SECONDS_TO_DIE = 90.0


class Build(Protocol):
    """A build under way."""

    def returncode(self) -> int | None:
        """Return the exit code, or None while it runs."""
        ...

    def kill(self, what: str) -> bool:
        """Kill `job` or one `engine` with SIGKILL; False where there was none to kill."""
        ...

    def output(self) -> str:
        """Return what it printed."""
        ...


class ForkedBuild:
    """A build in a forked child of this process."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        """Fork; the child builds and leaves."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - read after the child ended
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
            os._exit(_teach(recipe))

    def returncode(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self, what: str) -> bool:
        """Kill the child; it has no engine beside itself."""
        if self.returncode() is not None:
            return False
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        self._code = os.waitstatus_to_exitcode(status)
        return self._code == -signal.SIGKILL

    def output(self) -> str:
        """Return what it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


class ProgramBuild:
    """`decant teach` in a process group of its own, with whatever processes it starts."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        """Write the recipe beside its cache and start the program."""
        directory = Path(recipe["output_dir"])
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "trial.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        self._mark = f"decant-trial-{secrets.token_hex(8)}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - read after the process ended
        self._process = subprocess.Popen(  # noqa: S603 - this program itself
            own_command("-m", "tools.cli", "teach", str(path), "--max-set-aside", "0.5"),
            env={**own_environment(), "DECANT_TRIAL_MARK": self._mark},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def returncode(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def kill(self, what: str) -> bool:
        """Kill one engine under Ray, or the process group and all that it started; then wait until they are gone."""
        if self.returncode() is not None:
            return False
        if what == "engine":
            engines = self._processes("ray::EngineWorker")
            return bool(engines) and _kill(engines[0])
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        bound = time.monotonic() + SECONDS_TO_DIE
        while (left := self._processes("")) and time.monotonic() < bound:
            for pid in left:
                if "ray" in _command(pid):  # Ray's own end by themselves, seconds later
                    _kill(pid)
            time.sleep(0.1)
        if left:
            raise RuntimeError(f"processes {left} survived the build that started them")
        return True

    def output(self) -> str:
        """Return what it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _processes(self, command: str) -> list[int]:
        """Return marked processes whose command line begins so."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                marked = self._mark.encode() in path.read_bytes()
            except OSError:
                continue  # ended while we looked, or not ours
            pid = int(path.parent.name)
            if marked and _command(pid).startswith(command):
                found.append(pid)
        return sorted(found)


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked child, through JSON.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                file.write(json.dumps(work()).encode())
                file.flush()
                code = 0
            except BaseException:  # noqa: BLE001 - a child must end here, whatever happens
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"a check ended with status {os.waitstatus_to_exitcode(status)}")
        file.seek(0)
        return json.loads(file.read())


def import_everything() -> None:
    """Import what a build on the transformers engine needs, so that children have it."""
    import datasets  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import teacher_cache.build  # noqa: F401

    torch.set_num_threads(1)


def _teach(recipe: dict[str, Any]) -> int:
    from shared.errors import DecantError
    from shared.recipe.recipe import Recipe
    from teacher_cache.build import teach

    try:
        teach(Recipe.model_validate(recipe), max_set_aside=0.5)
    except DecantError as error:
        print(error, flush=True)
        return 1
    except Exception:  # noqa: BLE001 - judged by the parent
        traceback.print_exc()
        return 2
    return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> bool:
    """Kill a process; False where it has ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True

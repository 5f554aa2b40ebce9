"""Run Python written by a model, outside this process and behind walls, or refuse to.

Each program gets a process of its own (`sandbox_child.py`) with an empty environment, a private directory that is
removed afterwards, limits on time, memory, files and output, no network, no second process or thread, and no way to
read or write anything but the Python installation and its own directory. Walls, best first:
- bubblewrap: namespaces of its own, plus the two below where the kernel has them;
- Landlock (files, signals) and a seccomp allowlist (system calls), through ctypes, with all capabilities dropped.
Each is believed only after a probe that tries to get out. These hold for root, too: RLIMIT_NPROC does not stop root, a
filter does.

A program can say of itself that it passed (it can dig its verdict's nonce out of the interpreter that runs it). So
code that is to be judged runs `beside` its judge, each behind its own walls, and only data crosses between them
(`function_calls`).

Cost: about 10 ms a program with Landlock, whose processes are forked (`fork_server`), 70 ms with bubblewrap, which
starts an interpreter for each; `run_many` keeps two at work.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import queue
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError, reason_of
from tools.evaluate.sandbox import scratch_directory
from tools.evaluate.sandbox.confined_process import Confined, Launch, Limits, watch
from tools.evaluate.sandbox.fork_server import ForkServer
from tools.evaluate.sandbox.interpreter import start_interpreter
from tools.evaluate.sandbox.sandbox_filter import seccomp_filter

_CHILD = Path(__file__).with_name("sandbox_child.py")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/nix/store")
_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")

LANDLOCK = "landlock+seccomp"
UNSAFE = "none"
"""The mechanism named when the user allowed code without walls."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one program."""

    passed: bool
    """It ran to its end without an exception."""
    reason: str
    """Empty, or what it died of, in a few words."""
    seconds: float
    """Wall time, start included."""


def require(allow_unsafe: bool = False) -> str:
    """Name the mechanism that will be used.

    Raises:
        EvaluationError: this machine has none and the user did not allow code without one.
    """
    mechanism = available()
    if mechanism is not None:
        return mechanism
    if allow_unsafe:
        return UNSAFE
    raise EvaluationError(
        "no sandbox for code written by a model: this machine has neither a working bubblewrap nor a kernel with "
        "Landlock and seccomp; install bubblewrap, leave the task out, or run on a machine that has nothing to lose "
        "with --allow-unsafe-code"
    )


@functools.cache
def available() -> str | None:
    """Name the best mechanism that held against a probe on this machine, or None."""
    for mechanism in ("bubblewrap", LANDLOCK):
        if _holds(mechanism):
            return mechanism
    return None


def run(code: str, limits: Limits | None = None, mechanism: str | None = None, beside: str | None = None) -> Verdict:
    """Run one program to its end or its limits; its end is the verdict.

    With `beside`, a second program runs behind walls of its own at the same time; in both, `PIPES` are two descriptors
    (read, write) to the other. The second cannot touch the first, its files or its verdict, only answer it.

    Raises:
        EvaluationError: the walls could not be put up; no program ran.
    """
    mechanism = mechanism or require()
    with _launcher(mechanism) as launch:
        return _verdict(launch, code, beside, limits or Limits(), mechanism)


def _verdict(launch: Launch, code: str, beside: str | None, limits: Limits, mechanism: str) -> Verdict:
    started = time.monotonic()
    codes = [code] if beside is None else [code, beside]
    scratches: list[Path] = []
    try:
        try:
            scratches += [Path(tempfile.mkdtemp(prefix="decant-sandbox-")) for _ in codes]
        except OSError as error:
            raise EvaluationError(
                f"the sandbox has no directory to run a program in: {reason_of(error)}; set TMPDIR to one with space"
            ) from error
        reason = _run_in(launch, scratches, codes, limits, mechanism)
    finally:
        left = [sentence for scratch in scratches if (sentence := _remove(scratch))]
    reason = reason or next(iter(left), "")
    return Verdict(not reason, reason, time.monotonic() - started)


def run_many(
    programs: Sequence[str | tuple[str, str]], mechanism: str | None = None, workers: int = 2
) -> list[Verdict]:
    """Run programs, or pairs of one and the one beside it, `workers` at a time; verdicts come in their order."""
    mechanism, limits = mechanism or require(), Limits()

    def verdict_of(program: str | tuple[str, str]) -> Verdict:
        """Judge one of them with the launcher that is free."""
        code, beside = (program, None) if isinstance(program, str) else program
        launch = launchers.get()
        try:
            return _verdict(launch, code, beside, limits, mechanism)
        except EvaluationError:
            raise  # of this machine, not of this program
        except Exception as error:  # noqa: BLE001 - one program's doing must not cost the others their verdicts
            return Verdict(False, f"it could not be judged: {type(error).__name__}: {error}"[:400], 0.0)
        finally:
            launchers.put(launch)

    launchers: queue.SimpleQueue[Launch] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in range(workers):
            launchers.put(stack.enter_context(_launcher(mechanism)))
        return list(pool.map(verdict_of, programs))


@contextlib.contextmanager
def _launcher(mechanism: str) -> Iterator[Launch]:
    if mechanism != LANDLOCK:
        yield lambda scratch, descriptors: start_interpreter(_command(mechanism, scratch), scratch, descriptors)
        return
    with ForkServer.started([*_python(), str(_CHILD)]) as server:
        yield lambda scratch, descriptors: (server.fork(str(scratch), descriptors), None)


def _remove(scratch: Path) -> str:
    try:
        scratch_directory.remove(scratch)
    except OSError as error:
        return f"left {scratch}, which cannot be removed: {error.strerror}"
    return ""


def _run_in(launch: Launch, scratches: Sequence[Path], codes: Sequence[str], limits: Limits, mechanism: str) -> str:
    """Return what became of the first program: empty where it came to its end."""
    ends = [(), ()] if len(codes) == 1 else _pipes()
    programs: list[Confined] = []
    try:
        try:
            for scratch, code, pipes in zip(scratches, codes, ends, strict=False):
                programs.append(Confined.start(launch, _job(mechanism, scratch, code, limits), scratch, pipes))
        finally:
            for descriptor in (*ends[0], *ends[1]):
                os.close(descriptor)
        stopped = watch(programs, limits)
    finally:
        for program in programs:
            program.stop()
    failures = [program.failure() for program in programs]
    if stopped or failures[0] == "":
        return stopped
    if failures[0] is not None and failures[0].startswith("Broken:") and len(programs) == 2:
        return failures[1] or (programs[1].death() if failures[1] is None else failures[0])
    return failures[0] or programs[0].death()


def _pipes() -> list[tuple[int, int]]:
    """Return (read, write) of each of two programs that are to talk."""
    (read_first, write_second), (read_second, write_first) = os.pipe(), os.pipe()
    return [(read_first, write_first), (read_second, write_second)]


def _readable() -> list[str]:
    own = [sys.base_prefix] if Path(sys.base_prefix) != Path("/") else []
    stdlib = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return [str(path) for path in dict.fromkeys([*own, *stdlib, *_LIBRARIES, *_FILES]) if Path(path).exists()]


def _python() -> list[str]:
    # -E is left out on purpose: the environment is ours, and PYTHONHASHSEED makes the order of sets the same in every
    # run.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return [interpreter, "-s", "-P", "-S", "-B", "-X", "utf8"]


def _command(mechanism: str, scratch: Path) -> list[str]:
    if mechanism != "bubblewrap":
        return [*_python(), str(_CHILD)]
    binds = [
        word
        for path in [*_readable(), str(_CHILD)]
        if not path.startswith("/dev/")
        for word in ("--ro-bind", path, path)
    ]
    walls = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    walls += ["--setenv", "PYTHONHASHSEED", "0"]
    places = ["--dev", "/dev", "--bind", str(scratch), str(scratch), "--chdir", str(scratch)]
    return [str(shutil.which("bwrap")), *walls, *binds, *places, "--", *_python(), str(_CHILD)]


@functools.cache
def _landlock_works() -> bool:
    code = f"import runpy; print(runpy.run_path({str(_CHILD)!r})['landlock_abi']())"
    command = [sys.executable, "-I", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    return found.returncode == 0 and int(found.stdout or 0) > 0


def _job(mechanism: str, scratch: Path, code: str, limits: Limits) -> dict[str, Any]:
    filter_bytes = seccomp_filter(platform.machine()) if sys.platform == "linux" else None
    cpu_seconds = max(1, math.ceil(limits.seconds))
    return {
        "code": code,
        "parent": None if mechanism == "bubblewrap" else os.getpid(),
        "unsafe": mechanism == UNSAFE,
        "landlock": _landlock_works() if mechanism == "bubblewrap" else mechanism == LANDLOCK,
        "seccomp": filter_bytes.hex() if filter_bytes else None,
        "readable": _readable(),
        "writable": str(scratch),
        "limits": {
            "RLIMIT_CPU": cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }


def _holds(mechanism: str) -> bool:
    """Put the walls up and try to get out by file, network and process; True if none was possible and Python works."""
    if sys.platform != "linux":
        return False
    if mechanism == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    if mechanism == LANDLOCK and not (seccomp_filter(platform.machine()) and _landlock_works()):
        return False
    with tempfile.NamedTemporaryFile(prefix="decant-probe-") as secret:
        secret.write(b"secret")
        secret.flush()
        tries = [
            f"open({secret.name!r}).read()",
            f"open({secret.name!r}, 'a')",
            "_socket.create()",
            f"os.kill({os.getpid()}, 0)",
        ]
        try:
            verdict = run(_probe(tries), Limits(seconds=10), mechanism)
        except EvaluationError:
            return False
    return verdict.passed


def _probe(tries: Iterable[str]) -> str:
    lines = ["import os, math, json, collections, random, re", "import socket as _s", "class _socket:"]
    lines += ["    @staticmethod", "    def create(): _s.create_connection(('127.0.0.1', 9), 1).close()"]
    for attempt in tries:
        lines += [
            "try:",
            f"    {attempt}",
            "except (OSError, PermissionError): pass",
            "else: raise SystemExit('got out')",
        ]
    return "\n".join(lines)

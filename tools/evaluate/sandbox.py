"""Run Python written by a model, outside this process and behind walls, or refuse to.

Each program gets a fresh interpreter (`sandbox_child.py`) with an empty environment, a private directory that is
removed afterwards, limits on time, memory, files and output, no network, no second process or thread, and no way to
read or write anything but the Python installation and its own directory. Walls, best first:
- bubblewrap: namespaces of its own, plus the two below where the kernel has them;
- Landlock (files, signals) and a seccomp allowlist (system calls), through ctypes, with all capabilities dropped.
Each is believed only after a probe that tries to get out. These hold for root, too: RLIMIT_NPROC does not stop root, a
filter does.

A program that digs its verdict's nonce out of the interpreter that runs it can claim to have passed: scores are meant
for models that answer, not for opponents. Nothing else that it does leaves the walls.

Cost: about 30 ms a program with Landlock, 40 ms with bubblewrap; `run_many` keeps two at work.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from tools.evaluate.sandbox_filter import seccomp_filter

_CHILD = Path(__file__).with_name("sandbox_child.py")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/nix/store")
_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
_TICK_SECONDS = 0.05
_START_SECONDS = 20.0
"""Longest start of an interpreter on a busy machine."""
_WALL_PER_CPU = 3.0
"""Wall seconds allowed per second of processor time, so that a busy machine does not decide who passes."""

UNSAFE = "none"
"""The mechanism named when the user allowed code without walls."""


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
        "Landlock and "
        "seccomp; install bubblewrap, leave the task out, or run on a machine that has nothing to lose with "
        "--allow-unsafe-code"
    )


@functools.cache
def available() -> str | None:
    """Name the best mechanism that held against a probe on this machine, or None."""
    for mechanism in ("bubblewrap", "landlock+seccomp"):
        if _holds(mechanism):
            return mechanism
    return None


def run(code: str, limits: Limits | None = None, mechanism: str | None = None) -> Verdict:
    """Run one program to its end or its limits.

    Raises:
        EvaluationError: the walls could not be put up; the program did not run.
    """
    limits = limits or Limits()
    mechanism = mechanism or require()
    scratch = Path(tempfile.mkdtemp(prefix="decant-sandbox-"))
    try:
        return _run_in(scratch, code, limits, mechanism)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_many(
    programs: Sequence[str], limits: Limits | None = None, mechanism: str | None = None, workers: int = 2
) -> list[Verdict]:
    """Run programs, `workers` at a time; verdicts come in the order of the programs."""
    mechanism = mechanism or require()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda code: run(code, limits, mechanism), programs))


def _readable() -> list[str]:
    own = [sys.base_prefix] if Path(sys.base_prefix) != Path("/") else []
    stdlib = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return [str(path) for path in dict.fromkeys([*own, *stdlib, *_LIBRARIES, *_FILES]) if Path(path).exists()]


def _command(mechanism: str, scratch: Path, verdict_fd: int) -> list[str]:
    # -E is left out on purpose: the environment is ours, and PYTHONHASHSEED makes the order of sets the same in every
    # run.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    python = [interpreter, "-s", "-P", "-S", "-B", "-X", "utf8"]
    child = [str(_CHILD), str(verdict_fd)]
    if mechanism != "bubblewrap":
        return [*python, *child]
    binds = [
        word
        for path in [*_readable(), str(_CHILD)]
        if not path.startswith("/dev/")
        for word in ("--ro-bind", path, path)
    ]
    walls = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    walls += ["--setenv", "PYTHONHASHSEED", "0"]
    places = ["--dev", "/dev", "--bind", str(scratch), str(scratch), "--chdir", str(scratch)]
    return [str(shutil.which("bwrap")), *walls, *binds, *places, "--", *python, *child]


@functools.cache
def _landlock_works() -> bool:
    code = f"import runpy; print(runpy.run_path({str(_CHILD)!r})['landlock_abi']())"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    return found.returncode == 0 and int(found.stdout or 0) > 0


def _job(mechanism: str, scratch: Path, code: str, limits: Limits, nonce: str) -> dict[str, Any]:
    filter_bytes = seccomp_filter(platform.machine()) if sys.platform == "linux" else None
    cpu_seconds = max(1, math.ceil(limits.seconds))
    return {
        "code": code,
        "nonce": nonce,
        "parent": None if mechanism == "bubblewrap" else os.getpid(),
        "unsafe": mechanism == UNSAFE,
        "landlock": _landlock_works() if mechanism == "bubblewrap" else mechanism == "landlock+seccomp",
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


def _run_in(scratch: Path, code: str, limits: Limits, mechanism: str) -> Verdict:
    started, nonce = time.monotonic(), secrets.token_hex(16)
    job = json.dumps(_job(mechanism, scratch, code, limits, nonce)).encode("utf-8", errors="replace")
    verdict_fd, child_fd = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603 - confining it is this module's purpose
            _command(mechanism, scratch, child_fd),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            env={"PYTHONHASHSEED": "0"},
            pass_fds=(child_fd,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(verdict_fd)
        raise EvaluationError(f"the sandbox ({mechanism}) could not start: {error}") from error
    finally:
        os.close(child_fd)
    try:
        _send(process, job)
        stopped, output, message = _watch(process, verdict_fd, scratch, limits)
    finally:
        _kill(process)
        os.close(verdict_fd)
    return _judge(stopped, output, message, nonce, process.returncode, time.monotonic() - started)


def _send(process: subprocess.Popen[bytes], job: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return  # it died first; the missing verdict says so


def _watch(
    process: subprocess.Popen[bytes], verdict_fd: int, scratch: Path, limits: Limits
) -> tuple[str, bytes, bytes]:
    """Read until the program ends or breaks a limit; return which (empty: none), its first output and the verdict's
    bytes.
    """
    assert process.stdout is not None
    output, message, num_output_bytes = b"", b"", 0
    deadline = time.monotonic() + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(verdict_fd, selectors.EVENT_READ)
        next_look = time.monotonic() + _TICK_SECONDS
        while selector.get_map():
            for key, _ in selector.select(_TICK_SECONDS):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fd == verdict_fd:
                    if not message:
                        deadline = time.monotonic() + _WALL_PER_CPU * limits.seconds
                    message = (message + chunk)[: 1 << 14]
                else:
                    num_output_bytes += len(chunk)
                    output = (output + chunk)[: 1 << 12]
            if num_output_bytes > limits.output_bytes:
                return f"printed more than {limits.output_bytes} bytes", output, message
            if time.monotonic() > deadline:
                return "ran out of time", output, message
            if time.monotonic() > next_look:
                if too_full := _too_full(scratch, limits):
                    return too_full, output, message
                next_look = time.monotonic() + _TICK_SECONDS
    return "", output, message


def _too_full(scratch: Path, limits: Limits) -> str:
    num_bytes = 0
    waiting, num_entries = [scratch], 0
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
            num_entries += len(entries)
            num_bytes += sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
            waiting += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            continue  # the program removed it meanwhile
        if num_entries > limits.num_files:
            return f"made more than {limits.num_files} files"
    return f"wrote more than {4 * limits.file_bytes} bytes" if num_bytes > 4 * limits.file_bytes else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _judge(stopped: str, output: bytes, message: bytes, nonce: str, status: int, seconds: float) -> Verdict:
    try:
        verdict = json.loads(message) if message.strip() else {}
    except ValueError:
        verdict = {}
    if not isinstance(verdict, dict) or verdict.get("nonce") != nonce:
        text = output.decode("utf-8", errors="replace").strip().splitlines()
        reason = stopped or _death(status, text[-1][:200] if text else "")
        return Verdict(False, reason, seconds)
    if not verdict["confined"]:
        raise EvaluationError(f"the sandbox could not confine a program and did not run it: {verdict['error']}")
    return Verdict(not verdict["error"], str(verdict["error"]), seconds)


def _death(status: int, last_line: str) -> str:
    if status == -signal.SIGXCPU or status == 128 + signal.SIGXCPU:
        return "ran out of processor time"
    if status < 0:
        return f"killed by signal {-status}"
    return f"left without a verdict (status {status}) {last_line}".strip()


def _holds(mechanism: str) -> bool:
    """Put the walls up and try to get out by file, network and process; True if nothing was possible and Python still
    works.
    """
    if sys.platform != "linux":
        return False
    if mechanism == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    if mechanism == "landlock+seccomp" and not (seccomp_filter(platform.machine()) and _landlock_works()):
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

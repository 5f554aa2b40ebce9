"""The process of one program written by a model: confine itself for good, then run it. Standard library only.

A script that reads a job from stdin; none of its own imports happen after the walls are up. Started with `--serve`, it
runs no program itself: it forks a process for each job that `fork_server` sends, and nothing of a program ever comes
into it. Order matters: death with the parent, limits, capabilities dropped (root without capabilities is nobody
special), no new privileges, Landlock (files), seccomp (system calls), then the program. What cannot be put up is an
error, never skipped.

The verdict goes to its own pipe: a space once the walls are up, then a nonce of the parent's and the failure, line
by line. So a program that leaves early with status 0 has not passed. One that digs for the nonce can say that it
has: a judge runs apart. Cost: about 50 ms, nearly all of it the interpreter's start and imports; 5 ms where it forks.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_DIR, _MAKE_REG, _TRUNCATE = 1 << 7, 1 << 8, 1 << 14
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Landlock ABI -> how many of its file rights the kernel knows."""

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 where it has none or it is switched off."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, argument: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero), what)


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Processor time: a signal that the parent can name first, the end a second later.
        end = value + 1 if name == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(number, (value, end))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, nothing), "dropping capabilities")


def _restrict_files(readable: list[str], writable: str) -> None:
    abi = landlock_abi()
    known = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
    # From version 4 on TCP is handled, from 6 on signals and abstract sockets that would leave the domain; nothing is
    # granted.
    attributes = (ctypes.c_uint64 * 3)(known, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _checked(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)), "Landlock ruleset"
    )
    try:
        for path in readable:
            _allow_path(ruleset, path, _READ_FILE | _READ_DIR)
        # Nothing may be removed or renamed: a file without a name keeps its bytes, and nobody outside could count them.
        write = _WRITE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
        _allow_path(ruleset, writable, (write | _READ_FILE | _READ_DIR) & known)
        _checked(_libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)), "Landlock")
    finally:
        os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112 - pathlib would be one more import in a process that only starts
            rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = rights.to_bytes(8, "little") + parent.to_bytes(4, "little")
        added = _libc.syscall(
            _LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint32(0)
        )
        _checked(added, f"Landlock rule for {path}")
    finally:
        os.close(parent)


def _restrict_calls(program: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    wanted = Program(len(program) // 8, program)
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(wanted), zero, zero), "seccomp filter")


def _confine(job: dict[str, Any]) -> None:
    if job["parent"] is not None:
        _prctl(_PR_SET_PDEATHSIG, 9, "death with the parent")
        if os.getppid() != job["parent"]:
            os._exit(1)
    _limit(job["limits"])
    if job["unsafe"]:
        return  # the user asked for it: a process of its own with limits, and no walls
    _drop_capabilities()
    _prctl(_PR_SET_DUMPABLE, 0, "no core, no tracing")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "no new privileges")
    if job["landlock"]:
        _restrict_files(job["readable"], job["writable"])
    if job["seccomp"]:
        _restrict_calls(bytes.fromhex(job["seccomp"]))


def _execute(code: str, pipes: tuple[int, ...]) -> str:
    """Run the program; return an empty string, or what it died of."""
    try:
        # Not "__main__": an example call behind that guard is no part of the answer.
        names = {"__name__": "program", "PIPES": pipes}
        exec(compile(code, "program", "exec"), names)  # noqa: S102 - the purpose of this process
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are failures of the program, too
        try:
            return f"{type(error).__name__}: {error}"[:400]
        except BaseException:  # noqa: BLE001 - an exception class of the program's own may fail to print
            return "an exception that cannot be shown"
    return ""


def run_job(verdict_fd: int, pipes: tuple[int, ...], forked_by: int | None = None) -> None:
    """Read the job from stdin, confine this process, run the program, send the verdict."""
    job = json.loads(sys.stdin.buffer.read())
    job["parent"] = forked_by or job["parent"]
    nonce = job.pop("nonce")
    write, leave = os.write, os._exit
    try:
        _confine(job)
    except (OSError, ValueError) as error:
        write(verdict_fd, f"{nonce}\n{error}".encode())
        leave(3)
    write(verdict_fd, b" ")  # the clock of wall time starts here
    failure = _execute(job["code"], pipes)
    write(verdict_fd, f"{nonce}\n{failure}".encode("utf-8", errors="replace"))
    leave(0)


def serve(channel_fd: int, become: Callable[[Any, list[int], int], None]) -> None:
    """Fork a process for whatever comes, which `become`s it with the descriptors that come with it; wait for one where
    its number comes. Ends when nobody can ask any more.
    """
    channel, own = socket.socket(fileno=channel_fd), os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, 1 << 14, 5)
        if not data:
            return
        wanted = json.loads(data)
        if isinstance(wanted, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(wanted, 0)[1])
        elif (answer := os.fork()) == 0:
            channel.close()
            become(wanted, descriptors, own)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(answer).encode())


def _become(scratch: str, descriptors: list[int], forked_by: int) -> None:
    """Be the process of one job, with nothing open but its descriptors: stdin, output, the verdict's, two pipes."""
    try:
        os.setsid()
        stdin, output, *others = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in descriptors)
        places = list(enumerate([stdin, output, output, *others]))
        for place, descriptor in places:
            os.dup2(descriptor, place)
        os.closerange(len(places), os.sysconf("SC_OPEN_MAX"))
        os.chdir(scratch)
        run_job(3, tuple(range(4, len(places))), forked_by)
    finally:
        os._exit(3)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _prctl(_PR_SET_PDEATHSIG, 9, "death with the parent")  # and its forks end with it
        if os.getppid() == int(sys.argv[2]):
            serve(int(sys.argv[3]), _become)
    else:
        run_job(int(sys.argv[1]), tuple(map(int, sys.argv[2:])))

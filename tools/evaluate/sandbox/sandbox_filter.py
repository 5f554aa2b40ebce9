"""Which system calls a confined program may make: a seccomp filter as bytes of classic BPF.

An allowlist: whatever is not named answers EPERM, so a call that a future kernel adds is closed too. What is left out
on
purpose: every way to a new process or thread (fork, vfork, clone, clone3, execve), to another process (kill, tgkill,
    ptrace,
process_vm_*, pidfd_*), to the network (socket, connect, ...), to io_uring, mounts, keys, ownership and modes of files,
ioctl, prctl and the setters of limits. `fcntl` may only duplicate and read flags, because F_SETOWN can make the kernel
signal others. Files may be made, but neither removed, renamed nor opened without a name (O_TMPFILE): what has no name
cannot be counted.

Cost: about 80 comparisons per system call, well under a microsecond.
"""

from __future__ import annotations

import struct

_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "fsync": 74,
    "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "chdir": 80, "mkdir": 83, "readlink": 89, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "mkdirat": 258,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "dup3": 292, "getrandom": 318, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
}  # fmt: skip

_AARCH64 = {
    "getcwd": 17, "dup": 23, "dup3": 24, "fcntl": 25, "mkdirat": 34, "ftruncate": 46, "faccessat": 48,
    "chdir": 49, "openat": 56, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
    "writev": 66, "pread64": 67, "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
    "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
    "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "sigaltstack": 132,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163,
    "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175,
    "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216,
    "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "statx": 291, "rseq": 293, "close_range": 436,
    "faccessat2": 439,
}  # fmt: skip

_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Machine -> audit architecture and system call numbers."""

_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC."""

_OPEN_FLAGS = {"open": 1, "openat": 2}
"""Which argument of a call is the flags."""
_O_TMPFILE = 1 << 22
"""The bit of O_TMPFILE that no other flag has, on both machines."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000


def seccomp_filter(machine: str) -> bytes | None:
    """Return the filter for a machine (as `platform.machine()` names it), 8 bytes an instruction; None if unknown."""
    known = _MACHINES.get(machine)
    if known is None:
        return None
    arch, numbers = known
    program = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, if_true=1), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    # The x32 numbers of x86_64 have bit 30 set, so that they equal none of these and end in EPERM like any other.
    for name, number in numbers.items():
        if name in _OPEN_FLAGS:
            flags = _op(_LOAD, _FIRST_ARGUMENT + 8 * _OPEN_FLAGS[name])
            refuse, allow = _op(_RETURN, _EPERM), _op(_RETURN, _ALLOW)
            program += [_op(_EQUAL, number, if_false=4), flags, _op(_ANY_BIT, _O_TMPFILE, if_false=1), refuse, allow]
        elif name != "fcntl":
            program += [_op(_EQUAL, number, if_false=1), _op(_RETURN, _ALLOW)]
    program += [_op(_EQUAL, numbers["fcntl"], if_true=1), _op(_RETURN, _EPERM), _op(_LOAD, _FIRST_ARGUMENT + 8)]
    for command in _FCNTL_COMMANDS:
        program += [_op(_EQUAL, command, if_false=1), _op(_RETURN, _ALLOW)]
    program.append(_op(_RETURN, _EPERM))
    return b"".join(program)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)

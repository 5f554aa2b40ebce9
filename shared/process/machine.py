"""What of this machine the process may use. Cost: a system call or two."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def num_cores() -> int:
    """Return how many cores this process may run on, where the system says that, else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its control group's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def available_bytes() -> int:
    """Return the memory that this process can take without swapping, within its control group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # no Linux: count what the system calls free
        if found := re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE):
            free = 1024 * int(found[1])
    return min(free, memory_bytes())

"""What a process holds, from the kernel's own account of it. Cost: one small file."""

from __future__ import annotations

from pathlib import Path


def memory_mib(name: str, pid: int | str = "self") -> float:
    """Return one line of /proc/PID/status in MiB; NaN where the process has none, as one that has ended.

    Args:
        name: RssAnon (its own pages, without those of mapped files) or VmHWM (all pages, at their peak; `ru_maxrss`
            would be a child's parent's, too).
        pid: left out: this process.

    >>> memory_mib("RssAnon") > 1
    True
    """
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return float("nan")

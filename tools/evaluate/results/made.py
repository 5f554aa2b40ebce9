"""When, with which version and on which machine a model was evaluated, and the most memory that it took.

It stands beside the figures and is never compared.
"""

from __future__ import annotations

import os
import platform
import resource
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def made() -> dict[str, Any]:
    """Return date (UTC), decant, machine and peak_memory_bytes with memory_of, of this process and those it started."""
    try:
        number = version("decant-kd")
    except PackageNotFoundError:
        number = "not installed"
    memory, of, machine = _memory()
    date = datetime.now(UTC).isoformat(timespec="minutes")
    return {"date": date, "decant": number, "machine": machine, "peak_memory_bytes": memory, "memory_of": of}


def _memory() -> tuple[int, str, str]:
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), "CUDA tensors", f"{torch.cuda.get_device_name(0)}, {machine}"
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * 1024, "resident memory", machine

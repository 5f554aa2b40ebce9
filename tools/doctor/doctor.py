"""`decant doctor`: what this machine can do, and the exact command that mends what it cannot.

Every check answers one question and never raises. Bounds of packages come from the installed distribution's own
metadata, so they are those of pyproject.toml. Cost: seconds, most of them for asking torch in a process of its own
whether it sees a GPU.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from shared.process.machine import memory_bytes
from tools.doctor.doctor_gpu import check_gpu
from tools.doctor.doctor_packages import Check, check_engine, check_packages, check_torchvision, installed

MIN_MEMORY_GB = 8
MIN_DISK_GB = 5
MIN_DISK_GB_CUDA = 15
"""Where the CUDA builds of torch and vLLM are still to be installed: over 10 GB, and something to work with."""


def examine() -> list[Check]:
    """Ask every question."""
    packages = [*check_packages(), check_engine(), *check_torchvision()]
    gpu = check_gpu()
    machine = [_compiler(), *gpu, _memory(), _disk(has_gpu=len(gpu) > 1), _sandbox()]
    return [_python(), _shared_place(), *packages, *machine]


def text(checks: list[Check]) -> str:
    """Lay the checks out for people."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok  " if check.passed else "FAIL" if check.required else "note"
        lines.append(f"{mark}  {check.name:{width}}  {check.found}")
        if not check.passed and check.mend:
            lines.append(f"      {'':{width}}  mend: {check.mend}")
    passed = sum(check.passed for check in checks)
    lines.append(f"{passed} of {len(checks)} checks passed")
    failed = [check.name for check in checks if check.required and not check.passed]
    lines += [f"required and missing: {', '.join(failed)}"] if failed else []
    return "\n".join(lines)


def _python() -> Check:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} at {sys.executable}"
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check(
        "python 3.11 to 3.13",
        fine,
        found,
        "" if fine else "apt-get install python3.11 python3.11-venv && make clean setup",
    )


def _shared_place() -> Check:
    """Say where `shared` comes from: such a name can be shadowed by another package or the current directory."""
    import shared

    root = Path(__file__).resolve().parents[2]
    place = Path(shared.__file__ or "").resolve().parent
    fine = place == root / "shared"
    return Check(
        "package `shared`",
        fine,
        f"loaded from {place}",
        "" if fine else f"{sys.executable} -m pip install -e {root}  # and run from {root}",
    )


def _compiler() -> Check:
    place = shutil.which("g++")
    return Check("g++ (vLLM compiles at run time)", place is not None, place or "not found", "apt-get install g++")


def _memory() -> Check:
    found = memory_bytes() / 1e9
    fine = found >= MIN_MEMORY_GB
    return Check(
        f"memory of {MIN_MEMORY_GB} GB",
        fine,
        f"{found:.1f} GB",
        "set VLLM_CPU_KVCACHE_SPACE=1 and smaller batches",
        required=False,
    )


def _disk(*, has_gpu: bool) -> Check:
    """Compare free space with what a set-up takes; one that is installed already has taken it."""
    found = shutil.disk_usage(Path.cwd()).free / 1e9
    wanted = MIN_DISK_GB_CUDA if has_gpu and installed("vllm") is None else MIN_DISK_GB
    fine = found >= wanted
    return Check(
        f"disk of {wanted} GB here",
        fine,
        f"{found:.1f} GB free in {Path.cwd()}",
        "free some space, or work elsewhere",
    )


def _sandbox() -> Check:
    from tools.evaluate.sandbox.sandbox import available

    mechanism = available()
    return Check(
        "sandbox for code tasks",
        mechanism is not None,
        mechanism or "neither bubblewrap nor Landlock with seccomp holds here",
        "apt-get install bubblewrap",
        required=False,
    )

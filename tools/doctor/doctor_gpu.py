"""What a machine with an NVIDIA GPU needs besides packages: a driver that is new enough, and what Triton compiles with.

Nothing here is asked of a machine without a GPU. Cost: nvidia-smi, and torch imported in a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from shared.models.gpus import ask_driver
from tools.doctor.doctor_packages import Check

OLDEST_DRIVER = {13: 580, 12: 525}
"""By CUDA version of torch's build: the oldest driver that runs it. The wheels of today are of CUDA 13."""
ASK_TORCH = (
    "import torch; print(torch.version.cuda or 'none', torch.cuda.device_count() if torch.cuda.is_available() else 0)"
)


def check_gpu() -> list[Check]:
    """Compare what the driver lists with what torch can use, and with what is needed to use it."""
    listed = ask_driver("name", "memory.total", "driver_version")
    if not listed:
        return [Check("GPU", True, "none; everything runs on the CPU", required=False)]
    said = (output([sys.executable, "-P", "-c", ASK_TORCH]) or "none 0").split()
    return [_gpu(listed, said[1]), _driver(listed[0][2], said[0]), _header(), _compiler()]


def _gpu(listed: list[list[str]], usable: str) -> Check:
    names = "; ".join(", ".join(parts[:2]) for parts in listed)
    fine = usable == str(len(listed))
    mend = "" if fine else "make clean setup  # installs the CUDA build of torch beside a working driver"
    return Check("GPU", fine, f"{names}; torch uses {usable}", mend, required=False)


def _driver(version: str, cuda: str) -> Check:
    """Compare the driver with the CUDA of torch's build; without torch, or with one for CPUs, with today's wheels."""
    major = cuda.split(".")[0]
    built = int(major) if major.isdigit() and int(major) in OLDEST_DRIVER else max(OLDEST_DRIVER)
    oldest = OLDEST_DRIVER[built]
    number = version.split(".")[0]
    fine = number.isdigit() and int(number) >= oldest
    mend = f"apt-get install nvidia-driver-{oldest} && reboot"
    return Check(f"driver {oldest} or newer (CUDA {built})", fine, version, "" if fine else mend)


def _header() -> Check:
    """Look for Python's C header: Triton compiles its launcher with it at the first kernel."""
    path = Path(sysconfig.get_path("include")) / "Python.h"
    package = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return Check("Python.h (Triton compiles at the first kernel)", path.is_file(), str(path), package)


def _compiler() -> Check:
    place = shutil.which("gcc") or shutil.which("cc")
    title = "gcc (Triton compiles at the first kernel)"
    return Check(title, place is not None, place or "not found", "apt-get install gcc")


def output(command: list[str]) -> str | None:
    """Return what a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

"""Which NVIDIA GPUs are there, and would work meant for one run on the CPU without anybody noticing?

What the driver lists is asked of nvidia-smi, for which torch need not be there. A driver that is older than torch's
CUDA, a CPU build of torch, or a container that sees a GPU without its libraries: torch then says that there is no GPU,
and a stage of hours becomes one of weeks. So a machine whose driver offers a GPU that torch cannot use is refused,
unless CUDA_VISIBLE_DEVICES says that no GPU is wanted. Cost: a process, or a look into /dev.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def list_gpus() -> list[tuple[str, tuple[int, ...]]]:
    """Return name and compute capability of every GPU; none where there is no driver.

    Example: `[("NVIDIA H200", (9, 0))]`.
    """
    found = ask_driver("name", "compute_cap")
    return [(name, tuple(map(int, ability.split(".")))) for name, ability in found if ability[:1].isdigit()]


def ask_driver(*fields: str) -> list[list[str]]:
    """Return the fields that the driver says of each GPU: `ask_driver("name")` -> `[["NVIDIA H200"]]`.

    None where there is no driver, or one that fails or does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - fixed
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    found = [[part.strip() for part in line.split(",")] for line in lines]
    return [parts for parts in found if len(parts) == len(fields)]


def offered_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Return the names of the GPUs that the driver offers, without asking torch; none where none is wanted."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    return sorted(path.name for path in devices.glob("nvidia[0-9]*"))


def unused_gpu(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """Return a sentence where the driver offers NVIDIA GPUs and torch can use none, else None.

    Args:
        environment: an empty CUDA_VISIBLE_DEVICES, or one of -1, says that no GPU is wanted.
        devices: where the driver puts nvidia0, nvidia1, ...
    """
    offered = offered_gpus(environment, devices)
    if not offered:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
    return (
        f"this machine has {len(offered)} NVIDIA GPU(s) ({', '.join(offered[:8])}) and torch {torch.__version__}, "
        f"{built}, can use none of them; `decant doctor` says what is missing, or set CUDA_VISIBLE_DEVICES= (empty) to "
        "work on the CPU"
    )

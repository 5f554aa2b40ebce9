"""Would work meant for a GPU run on the CPU without anybody noticing?

A driver that is older than torch's CUDA, a CPU build of torch, or a container that sees a GPU without its libraries:
torch then says that there is no GPU, and a stage of hours becomes one of weeks. So a machine whose driver offers a GPU
that torch cannot use is refused, unless CUDA_VISIBLE_DEVICES says that no GPU is wanted. Cost: a look into /dev.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


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

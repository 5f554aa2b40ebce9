"""Which NVIDIA GPUs the driver lists, asked of nvidia-smi: torch need not be there. Cost: a process."""

from __future__ import annotations

import shutil
import subprocess


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

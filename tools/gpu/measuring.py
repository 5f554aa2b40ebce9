"""How the parts of the GPU check measure: where, how far apart, how long."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

PAIRS = 7


def device() -> str:
    """Return `cuda`, or `cpu` where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def is_installed(name: str) -> bool:
    """Say whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest error relative to the largest entry of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double().to(a.device)).abs().max() / b.double().abs().max()) for a, b in pairs)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes, what it leaves to the GPU included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], times: int = PAIRS) -> float:
    """Return the median of a call's times, two unmeasured ones before them."""
    for _ in range(2):
        call()
    return statistics.median(seconds(call) for _ in range(times))


def ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Return the median of alternating pairs, first over second."""
    for call in (first, second, first, second):
        call()
    ratios = []
    for i in range(PAIRS):
        order = (first, second) if i % 2 == 0 else (second, first)
        measured = {id(call): seconds(call) for call in order}
        ratios.append(measured[id(first)] / measured[id(second)])
    return statistics.median(ratios)


def peak_gib(call: Callable[[], object]) -> float | None:
    """Return the GiB that a call allocates at most beyond what was there; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30

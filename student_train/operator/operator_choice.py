"""Which kernels the fused loss uses: torch's by chunks of positions, or Triton's by tiles of the vocabulary.

`auto` measures both on the first pack of a run on a GPU, twice to warm up and three times to count, and keeps the
faster; it costs ten losses, once. What cannot run here is refused, or for `auto` not considered.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch

from shared.errors import TrainingError, reason_of
from shared.text.printable import say

OPERATORS = ("torch", "triton")
WARM_UPS, COUNTED = 2, 3


def operator_for(setting: str, device_type: str) -> str:
    """Return `torch` or `triton`, or `auto` where both can run and a measurement must decide.

    Raises:
        TrainingError: Triton is asked for where it cannot run.
    """
    if setting == "torch":
        return "torch"
    missing = "an NVIDIA GPU" if device_type != "cuda" else "" if find_spec("triton") else "the package triton"
    if setting == "triton" and missing:
        raise TrainingError(
            f"trainer.operator is triton, which needs {missing}; set it to auto, or train where that is"
        )
    return "torch" if missing else setting


def faster_operator(
    loss: Callable[[str], object], seconds_of: Callable[[Callable[[], object]], float] | None = None
) -> str:
    """Return the operator whose `loss(operator)` takes less time; `torch` where Triton's cannot be compiled or does not
    fit.

    Args:
        loss: makes one loss with its gradients.
        seconds_of: measures a call; by the clock of a synchronised GPU where left out.
    """
    measure = seconds_of or _seconds
    medians: dict[str, float] = {}
    for operator in OPERATORS:
        try:
            for _ in range(WARM_UPS):
                loss(operator)
            medians[operator] = statistics.median(measure(partial(loss, operator)) for _ in range(COUNTED))
        except Exception as error:  # a compiler fails in its own ways, and the other path is there
            if operator == "torch":
                raise
            reason = reason_of(error, 120)
            say(f"the loss's Triton kernels cannot run here ({type(error).__name__}: {reason}), so torch's are used")
    return min(medians, key=lambda operator: medians[operator])


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start

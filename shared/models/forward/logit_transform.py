"""What a causal language model does to its logits after the output layer: a scale, then a soft cap.

Read from the config, where each family has its own name for it; a model's own logits are to be compared with it
before they are trusted, on states large enough that a cap shows. Cost: reading the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Return (scale, cap): logits are multiplied by the scale, and become cap tanh(logits / cap) where one is set.

    Example: `logits_scaling: 8` -> (0.125, None); `final_logit_softcapping: 30` -> (1.0, 30.0).
    """
    scale = 1.0
    for name in _FACTORS:
        scale *= float(getattr(config, name, None) or 1.0)
    for name in _DIVISORS:
        scale /= float(getattr(config, name, None) or 1.0)
    caps = [getattr(config, name) for name in _CAPS if getattr(config, name, None)]
    return scale, float(caps[0]) if caps else None


@contextmanager
def enlarged_input(output_layer: Any, factor: float) -> Iterator[list[bool]]:
    """Multiply what goes into a model's output layer, so that its logits are large enough to show what happens to them.

    Yields a list that is empty as long as the layer was not called.
    """
    calls: list[bool] = []

    def enlarge(module: Any, inputs: Any) -> Any:
        calls.append(True)
        return (inputs[0] * factor, *inputs[1:])

    handle = output_layer.register_forward_pre_hook(enlarge)
    try:
        yield calls
    finally:
        handle.remove()

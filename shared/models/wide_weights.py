"""A model computing in float32 for a while, whatever its weights are kept in: a check of structure must not drown in
rounding.

Each layer's own weights are widened just before it runs and given back afterwards, so that memory grows by one layer.
Layers of 4-bit weights keep their type of products. Cost: one copy of each layer's weights per pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def widest(model: Any) -> tuple[AbstractContextManager[None], bool]:
    """Return the context in which a model computes as widely as its attention can, and whether that is float32."""
    if model.config._attn_implementation in ("sdpa", "eager"):
        return in_float32(model), True
    return nullcontext(), False


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let every layer of `model` compute with float32 copies of its 16-bit weights, without the shortcuts of TF32."""
    import torch

    kept: dict[Any, dict[str, Any]] = {}

    def widen(module: Any, inputs: Any) -> None:
        if module not in kept:
            kept[module] = {name: weight for name, weight in module._parameters.items() if _is_narrow(weight)}
            for name, weight in kept[module].items():
                module._parameters[name] = torch.nn.Parameter(weight.detach().float(), requires_grad=False)

    def give_back(module: Any, inputs: Any, output: Any) -> None:
        module._parameters.update(kept.pop(module, {}))

    narrow = [module for module in model.modules() if any(_is_narrow(weight) for weight in module._parameters.values())]
    handles = [module.register_forward_pre_hook(widen) for module in narrow]
    handles += [module.register_forward_hook(give_back, always_call=True) for module in narrow]
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    try:
        matmul.fp32_precision, convolution.fp32_precision = "ieee", "ieee"
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
        for handle in handles:
            handle.remove()


def _is_narrow(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bfloat16, torch.float16)

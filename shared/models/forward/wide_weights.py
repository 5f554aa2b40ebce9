"""A model computing in float32 for a while, whatever its weights are kept in: a check of structure must not drown in
rounding.

A layer's weights are widened just before it runs and given back afterwards, so that memory grows by one layer.
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
    widened: dict[Any, list[list[Any]]] = {}

    def widen(module: Any, inputs: Any) -> None:
        new = [part for part in parts[module] if part not in kept]
        widened.setdefault(module, []).append(new)
        for part in new:
            kept[part] = {name: weight for name, weight in part._parameters.items() if _is_narrow(weight)}
            for name, weight in kept[part].items():
                part._parameters[name] = torch.nn.Parameter(weight.detach().float(), requires_grad=False)

    def give_back(module: Any, inputs: Any, output: Any) -> None:
        if widened.get(module):
            for part in widened[module].pop():
                part._parameters.update(kept.pop(part, {}))

    parts = _narrow_parts(model)
    handles = [module.register_forward_pre_hook(widen) for module in parts]
    handles += [module.register_forward_hook(give_back, always_call=True) for module in parts]
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    try:
        matmul.fp32_precision, convolution.fp32_precision = "ieee", "ieee"
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
        for handle in handles:
            handle.remove()


def _narrow_parts(model: Any) -> dict[Any, list[Any]]:
    """Return the modules that hold 16-bit weights, each with those whose weights it may read: itself, and in a layer of
    a list all below, since some layers multiply with the weight of a part that is never called; and in the whole model
    the head, whose input some turn into its type.
    """
    import torch

    narrow = [module for module in model.modules() if any(_is_narrow(weight) for weight in module._parameters.values())]
    parts = {module: [module] for module in narrow}
    holds, list_of = set(narrow), torch.nn.ModuleList
    for layers in (module for module in model.modules() if isinstance(module, list_of)):
        for layer in layers:
            below = [part for part in layer.modules() if part in holds]
            if below:
                parts[layer] = below
    beside = (child for child in model.children() if not any(isinstance(part, list_of) for part in child.modules()))
    parts[model] = [part for child in beside for part in child.modules() if part in holds]
    return parts


def _is_narrow(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bfloat16, torch.float16)

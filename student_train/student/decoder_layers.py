"""The decoder layers of a student, as what is repeated: compiled, or sharded, one by one.

Compiled by itself, a layer is one set of graphs for all layers alike, whatever the depth. Lengths are dynamic and the
attention of packed rows stays outside (row_attention.py), so that packs of other lengths or other numbers of rows
compile nothing again. *Measured*: a Qwen3 makes four graphs in its first pack and none in the thirteen after it.
Cost: a compilation in the first step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.errors import TrainingError


def decoder_layers(base: Any, setting: str) -> list[nn.Module]:
    """Return the layers of a causal language model.

    Raises:
        TrainingError: the model does not say which of its modules they are, which `setting` needs.
    """
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise TrainingError(
            f"{type(base).__name__} does not name its decoder layers, which {setting} needs; leave it out"
        )
    return layers


def compile_layers(base: Any, backend: Any = "inductor") -> None:
    """Compile every layer of a model in place.

    Raises:
        TrainingError: the model does not name its layers.
    """
    for layer in decoder_layers(base, "trainer.torch_compile"):
        layer.compile(dynamic=True, backend=backend)

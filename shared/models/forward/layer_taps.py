"""Where a model's layers can be seen from: the list of its blocks, and the attention function that transformers looks
up by name, wrapped once per process.

Cost: one dictionary look-up per layer and forward pass.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

_MARK = "_decant_attention_tap"


class AttentionTap(Protocol):
    """What is shown what a layer attends with."""

    def see(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        """Look at the queries and keys of a layer, positions applied, before they are attended with."""


def find_blocks(model: Any) -> nn.ModuleList | None:
    """Return a model's blocks, first to last; None where it has no list of as many as its config says."""
    count = model.config.get_text_config().num_hidden_layers
    by_depth = sorted(model.named_modules(), key=lambda item: item[0].count("."))
    lists = (module for _, module in by_depth if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, None)


def tap_attention(block: nn.Module, tap: AttentionTap, layer: int) -> None:
    """Show `tap` what the attention of a block works with, once `wrap_attention` has been called."""
    for module in block.modules():
        module.__dict__[_MARK] = (tap, layer)


def untap_attention(block: nn.Module) -> None:
    """Show nobody a block's attention."""
    for module in block.modules():
        module.__dict__.pop(_MARK, None)


def wrap_attention(name: str) -> bool:
    """Let the attention function of that name show tapped layers; False where transformers has none of that name."""
    from transformers import AttentionInterface

    functions = AttentionInterface()
    if name not in functions:
        return False
    plain = functions[name]
    if getattr(plain, "shows_tapped_layers", False):
        return True

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        tapped = module.__dict__.get(_MARK)
        if tapped is not None:
            tap, layer = tapped
            tap.see(layer, query, key, attention_mask, options)
        return plain(module, query, key, value, attention_mask, **options)

    attend.shows_tapped_layers = True  # type: ignore[attr-defined]
    AttentionInterface.register(name, attend)
    return True

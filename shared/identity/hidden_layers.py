"""Layer numbers that a recipe means, for a teacher or student of so many blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.errors import UsageError
from shared.identity.hidden_identity import FINAL, HiddenIdentity
from shared.recipe.sections.hidden import HiddenCapture


def spread_evenly(count: int, num_layers: int) -> tuple[int, ...]:
    """Return `count` layers at equal distances, the last among them.

    >>> spread_evenly(3, 24)
    (8, 16, 24)
    """
    return tuple(-(-num_layers * (i + 1) // count) for i in range(count))


def numbered(layers: int | Sequence[int | str], num_layers: int, key: str) -> tuple[int, ...]:
    """Return ascending layer numbers, FINAL last.

    Args:
        layers: how many to spread evenly, or numbers and `final`.
        num_layers: blocks of the model.
        key: where the recipe says so, for messages.

    Raises:
        UsageError: the model has no such layer, or fewer than are to be spread.
    """
    if isinstance(layers, int):
        if layers > num_layers:
            raise UsageError(
                f"`{key}` asks for {layers} layers of a teacher that has {num_layers}; ask for at most {num_layers}"
            )
        return spread_evenly(layers, num_layers)
    for layer in layers:
        if isinstance(layer, int) and layer > num_layers:
            raise UsageError(
                f"`{key}` names layer {layer} of a teacher that has {num_layers}; name layers from 1 to {num_layers}"
                + ("" if key.endswith("attention.layers") else ", or 'final'")
            )
    plain = sorted(layer for layer in layers if isinstance(layer, int))
    return (*plain, *([FINAL] if "final" in layers else []))


def layer_name(layer: int) -> str:
    """Return how people write a layer's number."""
    return "final" if layer == FINAL else str(layer)


def kept(capture: HiddenCapture, num_layers: int) -> dict[str, Any]:
    """Return the fields of a hidden layer's identity that a recipe says, for a teacher of so many blocks.

    Raises:
        UsageError: the teacher has no such layer.
    """
    attention = capture.attention
    return {
        "layers": numbered(capture.layers, num_layers, "capture.hidden.layers"),
        "projection": capture.projection,
        "projection_seed": capture.projection_seed,
        "pooled": capture.pooled,
        "attention_layers": numbered(attention.layers, num_layers, "capture.hidden.attention.layers")
        if attention
        else (),
        "strongest": attention.strongest if attention else 0,
    }


def keeps(identity: HiddenIdentity, capture: HiddenCapture) -> bool:
    """Tell whether a hidden layer is what a recipe would capture, as far as can be said without the
    teacher's weights.
    """
    try:
        wanted = kept(capture, identity.num_layers)
    except UsageError:  # another teacher's
        return False
    return all(getattr(identity, name) == value for name, value in wanted.items())

"""What a build reuses of a cache's layers, in a line for people."""

from __future__ import annotations

from collections.abc import Mapping

from shared.cache.layout import Layer
from shared.identity.identity import LayerIdentity, difference
from shared.recipe.recipe import Capture


def capture_of(capture: Capture, identity: LayerIdentity) -> Capture:
    """Return a recipe's capture as the layer that serves it was captured, so that new rows fit that layer."""
    names = type(capture).model_fields.keys() & {"k", "mass", "temperatures"}
    return capture.model_copy(update={name: getattr(identity, name) for name in names})


def reuse_line(layers: Mapping[str, Layer], serving: Layer | None, wanted: LayerIdentity, num_rows: int) -> str | None:
    """Say which layer serves a capture and why, or what a new layer over rows that are there shares with the others.

    Args:
        layers: those of the cache before this build.
        serving: the one of them that has or holds the capture.
        wanted: identity of the recipe's teacher and capture.
        num_rows: rows of the cache before this build.

    Returns:
        One line; None where there is nothing to tell: the first layer of a cache, or the capture's own.
    """
    if serving is not None:
        clause = _left_out(serving.identity, wanted)
        if not clause and serving.identity.draw_key != wanted.draw_key:
            return f"layer {serving.full_name} was begun with an older rule and keeps it: equal contexts share draws"
        if not clause:
            return None
        held = f"layer {serving.full_name} holds this capture ({clause})"
        return f"{held} and is cut exactly when it is read; no layer is added"
    if not layers or not num_rows:
        return None
    other = min(layers.values(), key=lambda layer: (_num_differences(layer.identity, wanted), layer.full_name))
    reason = difference(other.identity, wanted)
    return (
        f"new layer over {num_rows:,} rows that are there, no answer is generated again ({other.full_name}: {reason})"
    )


def _left_out(found: LayerIdentity, wanted: LayerIdentity) -> str:
    """Return what of a layer the capture leaves out, as 'k 32 of 64, temperatures 1 of 1, 2'; nothing where they are
    equal.
    """
    parts = [
        f"{name} {getattr(wanted, name):g} of {getattr(found, name):g}"
        for name in ("k", "mass")
        if _differs(name, found, wanted)
    ]
    if _differs("temperatures", found, wanted):
        listed = (", ".join(f"{value:g}" for value in identity.temperatures) for identity in (wanted, found))
        parts.append("temperatures " + " of ".join(listed))
    return ", ".join(parts)


def _differs(name: str, found: LayerIdentity, wanted: LayerIdentity) -> bool:
    return bool(getattr(found, name) != getattr(wanted, name))


def _num_differences(found: LayerIdentity, wanted: LayerIdentity) -> int:
    mine, theirs = found.to_json(), wanted.to_json()
    return sum(mine.get(name) != theirs.get(name) for name in mine | theirs)

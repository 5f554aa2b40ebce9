"""Which targets layer a recipe means where it names none: the one that its own `capture` describes.

A cache with one layer needs no choice. With several, the recipe that captured one of them goes on to train and to evaluate on that
one; only where that leaves several (another teacher with the same capture) must the stage say `targets`.
Cost: one small file per layer.
"""

from __future__ import annotations

from shared.identity import LayerIdentity
from shared.layout import list_layers
from shared.recipe import Recipe


def layer_of_capture(recipe: Recipe) -> str | None:
    """Return the full name of the one layer that the recipe's teacher and capture describe; None leaves it to the reader."""
    if recipe.teacher is None or len(recipe.cache) != 1:
        return None
    layers = list_layers(recipe.cache[0])
    if len(layers) < 2:
        return None
    fitting = [name for name, layer in layers.items() if _describes(recipe, layer.identity)]
    return fitting[0] if len(fitting) == 1 else None


def _describes(recipe: Recipe, identity: LayerIdentity) -> bool:
    """Tell whether a layer is what the recipe would capture, as far as a recipe says without its teacher's files."""
    assert recipe.teacher is not None
    capture, teacher = recipe.capture, recipe.teacher
    wanted = (
        capture.mode,
        capture.k,
        capture.draws,
        capture.mass,
        capture.temperatures,
        capture.gap_step,
        teacher.model,
        teacher.dtype,
    )
    found = (identity.mode, identity.k, identity.draws, identity.mass, identity.temperatures, identity.gap_step, identity.teacher)
    return wanted == (*found, identity.dtype)

"""Which targets layer a capture means: the one that was captured so, else one that holds more and is cut when it is
read.

A build and the training after it choose alike: the capture's own layer first; else, of the layers of the same teacher
that hold everything the capture asks for (`shared.payload.narrowing`), the one with the least more. A recipe names no
weights, so where layers of two teachers would fit, the choice is left to the reader, who asks for a name; so it is
where the recipe has no `capture` section.
Cost: one small file per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shared.cache.layout import Layer, list_hidden_layers, list_layers
from shared.identity.hidden_layers import keeps
from shared.identity.identity import LayerIdentity, difference
from shared.payload.narrowing import LayerView, Narrowing
from shared.recipe.recipe import Capture, Recipe
from shared.recipe.sections.losses import LOSSES_WITHIN_HEAD, Loss, OnTargets


def serving_layer(layers: Mapping[str, Layer], wanted: LayerIdentity) -> Layer | None:
    """Return the layer that has or holds what a new layer of this identity would have; None where none does."""
    own = [layer for layer in layers.values() if layer.identity.hash8 == wanted.hash8]
    teacher = without_capture(wanted)
    alike = [layer for layer in layers.values() if difference(without_capture(layer.identity), teacher) is None]
    holding = [layer for layer in alike if holds(layer.identity, wanted)]
    return own[0] if own else min(holding, key=_richness, default=None)


def layer_of_capture(recipe: Recipe, path: Path | None = None) -> str | LayerView | None:
    """Return the layer that the recipe's teacher and capture mean, narrowed where it holds more; None leaves it to the
    reader.

    Args:
        recipe: with its teacher and capture.
        path: the cache; left out: the recipe's only one. Of several, they mean a layer where the recipe has prompts,
            since it builds those caches itself.
    """
    if recipe.teacher is None or (len(recipe.cache) != 1 and (path is None or not recipe.prompts)):
        return None
    teacher, capture = recipe.teacher, recipe.capture
    dtypes = {teacher.dtype, *(() if teacher.dtype != "auto" else ("float32", "bfloat16", "float16"))}
    listed = list_layers(path or recipe.cache[0]).values()
    layers = [layer for layer in listed if layer.identity.teacher == teacher.model and layer.identity.dtype in dtypes]
    layers = [layer for layer in layers if layer.identity.tail == "exact"]  # as a capture makes them
    layers = [layer for layer in layers if layer.short_name not in recipe.teachers]
    own = [layer for layer in layers if _same_capture(layer.identity, recipe)]
    if own:
        return own[0].full_name if len(own) == 1 else None
    holding = sorted((layer for layer in layers if holds(layer.identity, capture)), key=_richness)
    if "capture" not in recipe.model_fields_set or len({without_capture(layer.identity) for layer in holding}) != 1:
        return None
    narrowing = _narrowing_to(holding[0].identity, capture)
    return holding[0].full_name if narrowing is None else LayerView(holding[0].full_name, narrowing)


def holds(found: LayerIdentity, wanted: Capture | LayerIdentity) -> bool:
    """Tell whether a layer's targets hold those of a capture by the same teacher."""
    fixed = [(each.mode, each.draws, each.gap_step, each.label) for each in (found, wanted)]
    if fixed[0] != fixed[1]:
        return False
    if found.label == "head" and _narrowing_to(found, wanted) is not None:
        return False  # where a head is cut, a label that belonged to it would be cut as well
    if not set(wanted.temperatures) <= set(found.temperatures):
        return False
    if wanted.mode == "top":
        return found.k >= wanted.k and found.mass >= wanted.mass
    return _narrowing_to(found, wanted) is None


def _narrowing_to(found: LayerIdentity, wanted: Capture | LayerIdentity) -> Narrowing | None:
    """Return how heads of `found` become those of `wanted`; None where they are the same."""
    same_cut = found.mass == 1.0 or found.temperatures[-1] == wanted.temperatures[-1]
    if (found.k, found.mass) == (wanted.k, wanted.mass) and same_cut:
        return None
    return Narrowing(wanted.k, wanted.mass, wanted.temperatures[-1])


def loss_problem(identity: LayerIdentity, loss: Loss) -> str | None:
    """Say why a loss cannot be taken with the tail of a layer; None where it can, or does not look at it."""
    by_entropy = isinstance(loss, OnTargets) and loss.weigh == "entropy"
    within_head = loss.learns_from != "targets" or loss.name in LOSSES_WITHIN_HEAD
    if identity.tail != "unknown" or (within_head and not by_entropy):
        return None
    what = f"'{loss.name}' with weigh: entropy" if within_head else f"'{loss.name}'"
    return (
        f"{what} needs the teacher's mass outside its head, and the tail of layer {identity.name} is unknown (others "
        "made it); use 'head_kl' with 'cross_entropy'"
    )


def named_layer(recipe: Recipe, name: str | None, path: Path | None = None) -> str | LayerView | None:
    """Return the layer that a stage's `targets` means: by its name, or by the recipe's teacher and capture."""
    return name if name not in (None, "teacher") else layer_of_capture(recipe, path)


def hidden_layer_of(recipe: Recipe, path: Path) -> str | bool:
    """Return the name of the one hidden layer that the recipe captures; True leaves it to the reader, who takes the
    only one.
    """
    layers = list_hidden_layers(path)
    capture = recipe.capture.hidden
    if capture is None or len(layers) < 2:
        return True
    fitting = [name for name, layer in layers.items() if keeps(layer.identity, capture)]
    if recipe.teacher is not None and len(fitting) > 1:
        fitting = [name for name in fitting if layers[name].identity.teacher == recipe.teacher.model]
    return fitting[0] if len(fitting) == 1 else True


def _same_capture(identity: LayerIdentity, recipe: Recipe) -> bool:
    names = ("mode", "k", "draws", "mass", "temperatures", "gap_step", "label")
    return all(getattr(identity, name) == getattr(recipe.capture, name) for name in names)


def _richness(layer: Layer) -> tuple[object, ...]:
    identity = layer.identity
    return identity.k, identity.mass, len(identity.temperatures), identity.hash8


def without_capture(identity: LayerIdentity) -> LayerIdentity:
    """Return what layers of one teacher share; one whose draws have the older key serves too and keeps it."""
    return replace(identity, k=0, mass=1.0, temperatures=(1.0,), draw_key="context", label="apart")

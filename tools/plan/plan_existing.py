"""What a recipe's caches hold already, which of it the recipe's teacher scored, and what a position takes on disk.

A layer counts as done where it serves the identity that the recipe's teacher and capture would write: other weights are
another teacher, whatever their directory is called. Where the teacher's files are out of reach, names are compared.
Bytes per position are measured in that layer; else in one of another teacher or k with the same other settings; else
assumed. Cost: the teacher's tokenizer and a sample of its weights where the cache has layers, and the caches' records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from shared.cache.layer_choice import holds, serving_layer
from shared.cache.layout import Layer, list_layers, sequences_dir
from shared.errors import DecantError
from shared.identity.identity import LayerIdentity
from shared.parts.records import list_records
from shared.recipe.recipe import Capture, Recipe

BYTES_PER_ENTRY_EXPECTED, BYTES_PER_ENTRY_AT_MOST = 1.1, 2.44
"""Head entries of real text (70 bytes at k = 64) and of random ids in a vocabulary of 152,000 (156 bytes)."""
BYTES_PER_DRAW = 3.0
BYTES_PER_POSITION_FIXED = 6.0
"""Count, label and frame; 2 more for each temperature."""

Wanted = Callable[[], LayerIdentity | None]


def existing(recipe: Recipe, assumptions: list[str]) -> dict[str, Any]:
    """Return rows, tokens and positions of the caches, those without the recipe's targets, and bytes per position.

    Raises:
        CacheError: a cache cannot be read.
    """
    names = ("rows", "tokens", "positions", "unscored_tokens", "unscored_positions")
    total: dict[str, Any] = dict.fromkeys(names, 0)
    wanted, serving, others = _wanted(recipe, assumptions), list[Layer](), list[Layer]()
    for path in recipe.cache:
        if not (path / "cache.json").is_file():
            continue
        layers = list_layers(path)
        found = _serving(layers, recipe, wanted) if layers else None
        serving += [found] if found else []
        others += [layer for layer in layers.values() if layer is not found]
        stems = {record.stem for record in list_records(found.directory)} if found else set()
        for record in list_records(sequences_dir(path)):
            total["rows"] += record.rows
            total["tokens"] += record.stats["tokens"]
            total["positions"] += record.positions
            total["unscored_tokens"] += record.stats["tokens"] if record.stem not in stems else 0
            total["unscored_positions"] += record.positions if record.stem not in stems else 0
    total["bytes_per_position"] = _measured(serving)
    total["bytes_per_position_alike"] = _alike(others, recipe.capture)
    return total


def _wanted(recipe: Recipe, assumptions: list[str]) -> Wanted:
    """Return what gives, once asked, the identity of the recipe's layer, or None where its teacher is out of reach."""

    @cache
    def identity() -> LayerIdentity | None:
        """Return it; the teacher is read once."""
        from teacher_cache.teacher.teacher_identity import know_teacher, layer_identity

        if recipe.teacher is None:
            return None
        try:
            return layer_identity(know_teacher(recipe.teacher), recipe.teacher, recipe.capture)
        except DecantError as error:
            assumptions.append(f"layers are the teacher's where its name is theirs, since it is not here ({error})")
            return None

    return identity


def _serving(layers: Mapping[str, Layer], recipe: Recipe, wanted: Wanted) -> Layer | None:
    """Return the layer that has or holds what the recipe's teacher and capture would write."""
    identity, teacher = wanted(), recipe.teacher
    if identity is not None:
        return serving_layer(layers, identity)
    named = [layer for layer in layers.values() if teacher is None or layer.identity.teacher == teacher.model]
    holding = [layer for layer in named if holds(layer.identity, recipe.capture)]
    return min(holding, key=lambda layer: (layer.identity.k, layer.identity.mass, layer.full_name), default=None)


def _measured(layers: list[Layer]) -> float | None:
    """Return the mean bytes per position of layers, or None where they have no position."""
    records = [record for layer in layers for record in list_records(layer.directory)]
    positions = sum(record.positions for record in records)
    return sum(record.bytes for record in records) / positions if positions else None


def _alike(layers: list[Layer], capture: Capture) -> float | None:
    """Return bytes per position of a capture after the layer of nearest k whose other settings are its own, or None."""
    same = ("mode", "draws", "mass", "temperatures", "gap_step")
    found = [layer for layer in layers if all(getattr(layer.identity, n) == getattr(capture, n) for n in same)]
    for layer in sorted(found, key=lambda layer: abs(layer.identity.k - capture.k)):
        measured = _measured([layer])
        if measured is not None and (capture.mass == 1 or layer.identity.k == capture.k):
            fixed = min(_fixed_bytes(capture), measured)
            return fixed + (measured - fixed) * capture.k / max(layer.identity.k, 1)
    return None


def _fixed_bytes(capture: Capture) -> float:
    """Return bytes of a position beside its head's entries."""
    num_temperatures = len(capture.temperatures)
    return BYTES_PER_POSITION_FIXED + 2 * num_temperatures + BYTES_PER_DRAW * capture.draws * num_temperatures


def assumed_bytes_per_position(capture: Capture) -> tuple[float, float]:
    """Return bytes per position of a capture, expected and at most; a `mass` below 1 makes it less."""
    fixed = _fixed_bytes(capture)
    return fixed + BYTES_PER_ENTRY_EXPECTED * capture.k, fixed + BYTES_PER_ENTRY_AT_MOST * capture.k


def bytes_per_position(recipe: Recipe, there: Mapping[str, Any]) -> tuple[float, float]:
    """Return bytes per position, expected and at most: both measured where the cache has the layer itself."""
    measured, alike = there["bytes_per_position"], there["bytes_per_position_alike"]
    if measured is not None:
        return measured, measured
    expected, at_most = assumed_bytes_per_position(recipe.capture)
    return (expected, at_most) if alike is None else (alike, max(alike, at_most))


def bytes_assumption(recipe: Recipe, there: Mapping[str, Any]) -> str:
    """Say where the bytes per position come from."""
    expected, at_most = bytes_per_position(recipe, there)
    if there["bytes_per_position"] is not None:
        return f"{expected:.1f} bytes per position, measured in the cache's layer"
    if there["bytes_per_position_alike"] is not None:
        return f"{expected:.1f} bytes per position expected, as in a layer of the cache, {at_most:.0f} at most"
    return (
        f"{expected:.0f} bytes per position expected (real text), {at_most:.0f} at most (random ids); mass below 1 "
        "saves more"
    )

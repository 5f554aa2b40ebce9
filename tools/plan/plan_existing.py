"""What a recipe's caches hold already, which of it the recipe's teacher scored, and what a position takes on disk.

A layer counts as done where it serves the identity that the recipe's teacher and capture would write: other weights are
another teacher, whatever their directory is called. Where the teacher's files are out of reach, names are compared.
Bytes per position are measured in that layer; else in one of another teacher or k with the same other settings; else
assumed. Cost: the teacher's tokenizer and a sample of its weights where the cache has layers, and the caches' records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.cache.layer_choice import holds, serving_layer
from shared.cache.layout import HiddenLayer, Layer, list_layers, sequences_dir
from shared.errors import DecantError
from shared.parts.records import PartRecord, list_records
from shared.recipe.recipe import Capture, Recipe, Teacher
from tools.plan.plan_bounds import BOUNDS, BYTES_PER_TOKEN_OF_SEQUENCES, NOTHING, Bounds

if TYPE_CHECKING:
    from teacher_cache.teacher.teacher_identity import KnownTeacher

BYTES_PER_ENTRY_EXPECTED, BYTES_PER_ENTRY_AT_MOST = 1.1, 2.44
"""Head entries of real text (70 bytes at k = 64) and of random ids in a vocabulary of 152,000 (156 bytes)."""
BYTES_PER_DRAW = 3.0
BYTES_PER_POSITION_FIXED = 6.0
"""Count, label and frame; 2 more for each temperature."""

_Identity = TypeVar("_Identity")


def caches_there(recipe: Recipe) -> list[Path]:
    """Return the caches of a recipe that are there."""
    return [path for path in recipe.cache if (path / "cache.json").is_file()]


def existing(recipe: Recipe, assumptions: list[str]) -> dict[str, Any]:
    """Return rows, tokens and positions of the caches, those without the recipe's targets, and bytes per position.

    Raises:
        CacheError: a cache cannot be read.
    """
    from teacher_cache.teacher.teacher_identity import layer_identity

    names = ("rows", "tokens", "positions", "unscored_tokens", "unscored_positions")
    total: dict[str, Any] = dict.fromkeys(names, 0)
    there = {path: list_layers(path) for path in caches_there(recipe)}
    identity = (
        as_made(recipe, lambda known, teacher: layer_identity(known, teacher, recipe.capture), assumptions)
        if any(there.values())
        else None
    )
    serving, others = list[Layer](), list[Layer]()
    for path, layers in there.items():
        found = _named(layers, recipe) if identity is None else serving_layer(layers, identity)
        serving += [found] if found else []
        others += [layer for layer in layers.values() if layer is not found]
        records = list_records(sequences_dir(path))
        total["rows"] += sum(record.rows for record in records)
        for before, counted in (("", records), ("unscored_", lacking(records, found))):
            total[f"{before}tokens"] += sum(record.stats["tokens"] for record in counted)
            total[f"{before}positions"] += sum(record.positions for record in counted)
    total["bytes_per_position"] = measured(serving)
    total["bytes_per_position_alike"] = _alike(others, recipe.capture)
    return total


def as_made(
    recipe: Recipe, make: Callable[[KnownTeacher, Teacher], _Identity], assumptions: list[str]
) -> _Identity | None:
    """Return the identity that `make` gives a layer of the recipe's teacher, or None where that is out of reach."""
    from teacher_cache.teacher.teacher_identity import know_teacher

    if recipe.teacher is None:
        return None
    try:
        return make(know_teacher(recipe.teacher), recipe.teacher)
    except DecantError as error:
        said = f"layers are the teacher's where its name is theirs, since it is not here ({error})"
        assumptions += [said] if said not in assumptions else []
        return None


def _named(layers: Mapping[str, Layer], recipe: Recipe) -> Layer | None:
    """Return the layer of the recipe's teacher, by its name, that holds what the recipe's capture would write."""
    teacher = recipe.teacher
    of_teacher = [layer for layer in layers.values() if teacher is None or layer.identity.teacher == teacher.model]
    holding = [layer for layer in of_teacher if holds(layer.identity, recipe.capture)]
    return min(holding, key=lambda layer: (layer.identity.k, layer.identity.mass, layer.full_name), default=None)


def lacking(records: Sequence[PartRecord], layer: Layer | HiddenLayer | None) -> Sequence[PartRecord]:
    """Return those records of a cache's rows that a layer lacks: all of them where there is none."""
    done = {record.stem for record in list_records(layer.directory)} if layer is not None else set()
    return [record for record in records if record.stem not in done]


def measured(layers: Iterable[Layer | HiddenLayer]) -> float | None:
    """Return the mean bytes per position of layers, or None where they have no position."""
    records = [record for layer in layers for record in list_records(layer.directory)]
    positions = sum(record.positions for record in records)
    return sum(record.bytes for record in records) / positions if positions else None


def _alike(layers: list[Layer], capture: Capture) -> float | None:
    """Return bytes per position of a capture after the layer of nearest k whose other settings are its own, or None."""
    same = ("mode", "draws", "mass", "temperatures", "gap_step")
    alike = [layer for layer in layers if all(getattr(layer.identity, n) == getattr(capture, n) for n in same)]
    for layer in sorted(alike, key=lambda layer: abs(layer.identity.k - capture.k)):
        found = measured([layer])
        if found is not None and (capture.mass == 1 or layer.identity.k == capture.k):
            fixed = min(_fixed_bytes(capture), found)
            return fixed + (found - fixed) * capture.k / max(layer.identity.k, 1)
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
    own, alike = there["bytes_per_position"], there["bytes_per_position_alike"]
    if own is not None:
        return own, own
    expected, at_most = assumed_bytes_per_position(recipe.capture)
    return (expected, at_most) if alike is None else (alike, max(alike, at_most))


def target_bytes(recipe: Recipe, there: Mapping[str, Any], positions: Bounds, tokens: Bounds = NOTHING) -> Bounds:
    """Return the bytes of so many positions of targets, with those of the sequences of so many new tokens."""
    per_position = dict(zip(BOUNDS, bytes_per_position(recipe, there), strict=True))
    return {
        bound: round(positions[bound] * per_position[bound] + tokens[bound] * BYTES_PER_TOKEN_OF_SEQUENCES)
        for bound in BOUNDS
    }


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

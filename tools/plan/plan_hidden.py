"""What a hidden layer takes on disk, before it is built: from the teacher's shape alone, without compression.

Per position: L (D + 4) bytes of states (8-bit integers and a float32 scale), and per attention layer 2 bytes and 5 for
each kept key; per row D + 4 bytes of pooled state. Where the cache has such a layer, its bytes per position are
measured instead.
Cost: the teacher's config.json and the records of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shared.cache.layer_choice import hidden_layer_of
from shared.cache.layout import HiddenLayer, list_hidden_layers, sequences_dir
from shared.errors import EngineError, TrainingError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.hidden_layers import keeps, kept
from shared.parts.records import list_records
from shared.payload.hidden_codec import HiddenCodec
from shared.recipe.recipe import HiddenCapture, Recipe, Stage
from tools.cache.cache_commands import size
from tools.plan.plan_bounds import Bounds, sizes
from tools.plan.plan_existing import as_made, caches_there, lacking, measured

Figures = dict[str, Any]


def hidden_figures(recipe: Recipe, rows_to_do: int, positions_to_do: Bounds, assumptions: list[str]) -> Figures | None:
    """Return positions, bytes and bytes per position of the recipe's hidden layer; None where it asks for none.

    `positions_to_do` are `expected` and `at_most`; `assumptions` gains what is assumed, or why nothing can be said.

    Raises:
        UsageError: the teacher has no such layer.
    """
    capture = recipe.capture.hidden
    if capture is None or recipe.teacher is None:
        return None
    shape = _teacher_shape(recipe, assumptions)
    if shape is None:
        return None
    num_layers, width = shape
    asked = kept(capture, num_layers)
    layers, attention_layers = asked["layers"], asked["attention_layers"]
    codec = HiddenCodec(len(layers), capture.projection or width, False, len(attention_layers), asked["strongest"])
    most = codec.max_content_bytes(1)
    per_row = codec.width + 4 if capture.pooled != "none" else 0
    rows, positions, found = _there(recipe, capture, assumptions)
    expected = most if found is None else found
    total = {name: positions + count for name, count in positions_to_do.items()}
    if found is None:
        assumptions.append(f"{most:,} bytes of hidden states per position before compression, which takes a little off")
    else:
        assumptions.append(f"{found:,.1f} bytes of hidden states per position, measured in the cache's layer")
    num_rows = rows + rows_to_do
    bytes_at_most = total["at_most"] * most + num_rows * per_row
    return {
        "layers": list(layers),
        "attention_layers": list(attention_layers),
        "width": codec.width,
        "rows": num_rows,
        "positions": total,
        "bytes_per_position": expected,
        "bytes": {"expected": round(total["expected"] * expected + num_rows * per_row), "at_most": bytes_at_most},
        "part_bytes": round(bytes_at_most * min(1.0, recipe.rows_per_part / max(num_rows, 1))),
    }


def hidden_layer_to_train(recipe: Recipe, stage: Stage) -> HiddenIdentity | None:
    """Return the sizes of the hidden layer that a stage's losses read: of the first cache that has it, or of the one
    that the recipe would capture; None where they read none.

    Raises:
        TrainingError: neither is known.
        UsageError: the teacher has no such layer.
    """
    if not any(loss.learns_from == "hidden" for loss in stage.losses):
        return None
    for path in caches_there(recipe):
        layers = list_hidden_layers(path)
        named = stage.hidden or hidden_layer_of(recipe, path)
        if isinstance(named, str) and named in layers:
            return layers[named].identity
        if named is True and len(layers) == 1:
            return next(iter(layers.values())).identity
    capture = recipe.capture.hidden
    why: list[str] = []
    shape = _teacher_shape(recipe, why) if capture is not None and recipe.teacher is not None else None
    if capture is None or recipe.teacher is None or shape is None:
        reason = "; ".join(why) or "no cache of the recipe has one yet, and it captures none"
        raise TrainingError(
            f"the hidden layer that stage '{stage.name}' reads has unknown sizes: {reason}; add capture.hidden with a "
            "teacher whose files or assume.teacher say its shape, or name a cache that has the layer"
        )
    num_layers, width = shape
    return HiddenIdentity(
        teacher=recipe.teacher.model,
        weights_hash="",
        tokenizer_hash="",
        num_layers=num_layers,
        width=width,
        **kept(capture, num_layers),
    )


def _teacher_shape(recipe: Recipe, assumptions: list[str]) -> tuple[int, int] | None:
    """Return blocks and width of the teacher, from its files or as the recipe assumes; None where neither says."""
    from teacher_cache.teacher.model_files import ModelFiles, resolve_model

    assert recipe.teacher is not None
    try:
        files = resolve_model(recipe.teacher.model, recipe.teacher.revision)
        return files.num_hidden_layers, files.hidden_size
    except EngineError as error:
        assumed = recipe.assume.teacher
        reason = str(error)
    if assumed is None:
        assumptions.append(f"the hidden layer is not priced: {reason}; state the teacher's shape in assume.teacher")
        return None
    files = ModelFiles(recipe.teacher.model, recipe.output_dir, None, dict(assumed.config))
    try:
        shape = files.num_hidden_layers, files.hidden_size
    except EngineError:
        assumptions.append(
            "the hidden layer is not priced: assume.teacher.config lacks num_hidden_layers or hidden_size"
        )
        return None
    assumptions.append(f"hidden layer: a teacher of {shape[0]} blocks of width {shape[1]:,}, as the recipe assumes")
    return shape


def _there(recipe: Recipe, capture: HiddenCapture, assumptions: list[str]) -> tuple[int, int, float | None]:
    """Return rows and positions in the cache without hidden states, and what a position takes where some have them."""
    from teacher_cache.passes.hidden_pass import hidden_identity

    there = {path: list_hidden_layers(path) for path in caches_there(recipe)}
    identity = (
        as_made(recipe, lambda known, teacher: hidden_identity(known, teacher, capture), assumptions)
        if any(there.values())
        else None
    )
    layers = {path: _own(found.values(), recipe, capture, identity) for path, found in there.items()}
    records = [record for path in there for record in lacking(list_records(sequences_dir(path)), layers[path])]
    rows, positions = sum(record.rows for record in records), sum(record.positions for record in records)
    return rows, positions, measured(layer for layer in layers.values() if layer is not None)


def _own(
    layers: Iterable[HiddenLayer], recipe: Recipe, capture: HiddenCapture, identity: HiddenIdentity | None
) -> HiddenLayer | None:
    """Return the layer that the recipe would write; of a teacher out of reach, one of its name that keeps as much."""
    if identity is not None:
        return next((layer for layer in layers if layer.identity.hash8 == identity.hash8), None)
    name = recipe.teacher.model if recipe.teacher is not None else None
    return next((one for one in layers if one.identity.teacher == name and keeps(one.identity, capture)), None)


def hidden_lines(figures: Figures) -> list[str]:
    """Lay the figures out for people."""
    lines = [
        f"  hidden layer: {len(figures['layers'])} layers of width {figures['width']:,}, attention of "
        f"{len(figures['attention_layers'])}, {figures['positions']['expected']:,} positions to do",
        f"    disk     {sizes(figures['bytes'])} ({figures['bytes_per_position']:,.1f} bytes per position)",
    ]
    if figures["part_bytes"] > 2**30:
        lines.append(
            f"    memory   {size(figures['part_bytes'])} for one part at a time; lower rows_per_part to need less"
        )
    return lines

"""Pass 3, where the recipe asks for it: hidden states of every sequences part that a hidden layer lacks.

It runs in transformers whatever engine scored the targets, on the same weights, after that engine was closed; rows and
targets that are there are neither generated nor scored again. A part is held in memory until it is committed.
Cost: one prefill of every sequence, and the bytes of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import HiddenWriter
from shared.identity.hidden_identity import PROJECTION_NAME, HiddenIdentity
from shared.identity.hidden_layers import kept
from shared.parts.records import PartRecord
from shared.recipe.recipe import HiddenCapture, Teacher
from teacher_cache.passes.feeding import PassContext
from teacher_cache.passes.score import score_parts
from teacher_cache.passes.summary import PassFigures
from teacher_cache.teacher.teacher_identity import KnownTeacher, ran, software


def hidden_identity(known: KnownTeacher, teacher: Teacher, capture: HiddenCapture) -> HiddenIdentity:
    """Return the identity of the hidden layer that this teacher and capture make.

    Raises:
        UsageError: the teacher has no such layer.
        EngineError: its config.json does not say how many layers it has, or how wide they are.
    """
    num_layers = known.files.num_hidden_layers
    return HiddenIdentity(
        teacher=teacher.model,
        revision=known.files.revision,
        weights_hash=known.weights_hash,
        tokenizer_hash=known.tokenizer_hash,
        num_layers=num_layers,
        width=known.files.hidden_size,
        projection_kind="" if capture.projection is None else PROJECTION_NAME,
        dtype=known.files.dtype_as(teacher.dtype),
        adapter=known.adapter_hash,
        **kept(capture, num_layers),
    )


def open_hidden_layer(
    cache: CacheWriter, known: KnownTeacher, teacher: Teacher, capture: HiddenCapture
) -> HiddenWriter:
    """Create or open the layer; errors as for `hidden_identity` and `HiddenWriter.create_or_open`."""
    identity = hidden_identity(known, teacher, capture)
    provenance = {"engine": "transformers", "targets_engine": teacher.engine, **software()}
    return HiddenWriter.create_or_open(cache, None, identity, provenance, make=False)


def capture_parts(
    layer: HiddenWriter,
    records: Sequence[PartRecord],
    teacher: Teacher,
    known: KnownTeacher,
    context: PassContext,
    figures: PassFigures,
) -> None:
    """Capture these parts and commit each.

    Raises:
        EngineError: the teacher cannot be loaded, or its layers cannot be watched.
    """
    from teacher_cache.engines.transformers.hidden_engine import HiddenEngine

    engine = HiddenEngine.open(teacher, layer.identity, known.files.directory)
    try:
        score_parts(layer, records, engine.capture, lambda: ran(engine.provenance()), context, figures, "capture")
    finally:
        engine.close()

"""Pass 3, where the recipe asks for it: hidden states of every sequences part that a hidden layer lacks.

It runs in transformers whatever engine scored the targets, on the same weights, after that engine was closed; rows and
targets that are there are neither generated nor scored again. A part is held in memory until it is committed.
Cost: one prefill of every sequence, and the bytes of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import HiddenWriter
from shared.identity.hidden_identity import PROJECTION_NAME, HiddenIdentity
from shared.identity.hidden_layers import kept
from shared.parts.records import list_records
from shared.recipe.recipe import HiddenCapture, Teacher
from teacher_cache.passes.feeding import Desk
from teacher_cache.passes.score import parts_to_score, require_length, score_parts
from teacher_cache.passes.summary import BuildSummary
from teacher_cache.teacher.teacher_identity import KnownTeacher, software


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


@dataclass(slots=True)
class HiddenPass:
    """The hidden layer of a build."""

    teacher: Teacher
    known: KnownTeacher
    writer: HiddenWriter

    @classmethod
    def prepare(cls, cache: CacheWriter, known: KnownTeacher, teacher: Teacher, capture: HiddenCapture) -> HiddenPass:
        """Create or open the layer; errors as for `hidden_identity` and `HiddenWriter.create_or_open`."""
        identity = hidden_identity(known, teacher, capture)
        provenance = {"engine": "transformers", "targets_engine": teacher.engine, **software()}
        return cls(teacher, known, HiddenWriter.create_or_open(cache, None, identity, provenance, make=False))

    def describe(self, summary: BuildSummary) -> None:
        """Tell the summary what is there before anything runs."""
        summary.hidden_layer = self.writer.name
        summary.hidden_reused_rows = sum(record.rows for record in list_records(self.writer.directory))

    def run(
        self, own_stems: frozenset[str], id8: str | None, partition: tuple[int, int], desk: Desk, summary: BuildSummary
    ) -> None:
        """Capture this process's share of the missing parts; arguments as for `parts_to_score`.

        Raises:
            EngineError: the teacher cannot be loaded, or its layers cannot be watched.
        """
        records = parts_to_score(self.writer, own_stems, id8, partition)
        if not records:
            return
        require_length(self.writer, records, self.known.max_model_len)
        from teacher_cache.engines.transformers.hidden_engine import HiddenEngine

        engine = HiddenEngine.open(self.teacher, self.writer.identity, self.known.files.directory)
        ran: Mapping[str, Any] = {**software(), "engine": dict(engine.provenance())}
        try:
            score_parts(self.writer, records, engine.capture, lambda: ran, desk, summary.hidden, "capture")
        finally:
            engine.close()

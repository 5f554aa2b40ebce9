"""Hidden layers for the small training caches, captured by the real engine."""

from __future__ import annotations

from pathlib import Path

from shared.cache.layout import read_header
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import HiddenWriter
from shared.recipe.recipe import HiddenCapture
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines.protocol import ScoreRequest
from teacher_cache.engines.transformers.hidden_engine import HiddenEngine
from teacher_cache.passes.hidden_pass import hidden_identity
from teacher_cache.teacher.teacher_identity import know_teacher


def add_hidden(cache: Path, teacher_dir: Path, **capture) -> Path:
    """Capture a hidden layer of a cache's rows with a teacher; return the cache."""
    teacher = TransformersTeacher(model=str(teacher_dir), engine="transformers", dtype="float32")
    known = know_teacher(teacher)
    identity = hidden_identity(known, teacher, HiddenCapture.model_validate(capture))
    writer = HiddenWriter.create_or_open(CacheWriter(cache, read_header(cache).identity), None, identity, {})
    engine = HiddenEngine.open(teacher, identity, teacher_dir)
    for record in writer.missing():
        rows = writer.cache.read_sequences(record)
        requests = [ScoreRequest(i, 0, row.token_ids, row.spans) for i, row in enumerate(rows)]
        found = {captured.tag: captured.hidden for captured in engine.capture(iter(requests))}
        writer.write(record.stem, [row.key for row in rows], [found[i] for i in range(len(rows))], {})
    return cache

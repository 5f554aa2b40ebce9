"""Small deterministic caches for tests: the same arguments give the same bytes, whatever was there before.

Run as `python -m tests.shared.small_cache DIRECTORY` it builds one, so that tests can kill it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.keys import group_key, row_key
from shared.parts.jobs import Job, PlanRow, create_job
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.targets import SparseTargets
from tests.shared.dense_targets import cut

VOCAB = 50
TOKENIZER = {"tokenizer.json": b'{"model": {"vocab": {}}}', "chat_template.jinja": b"{{ messages }}"}
SEQUENCES = SequencesIdentity(tokenizer_hash="tokenizer", vocab_size=VOCAB, licence="CC0-1.0", answers="given")
TOP = LayerIdentity(
    teacher="teacher",
    weights_hash="weights",
    tokenizer_hash="tokenizer",
    vocab_size=VOCAB,
    mode="top",
    k=6,
    temperatures=(1.0, 2.0),
)
HYBRID = LayerIdentity(
    teacher="teacher",
    weights_hash="weights",
    tokenizer_hash="tokenizer",
    vocab_size=VOCAB,
    mode="top+sample",
    k=3,
    draws=4,
)
SOFTWARE = {"decant": "test"}


def plan_rows(first: int, last: int) -> Iterator[PlanRow]:
    """Rows of prompts number `first` to `last` - 1."""
    for number in range(first, last):
        group = group_key(f"prompt {number // 2}")
        yield PlanRow(
            group_key=group,
            row_key=row_key(group, {"temperature": 1.0}, number % 2, None),
            source=("math", "code")[number % 2],
            line=number + 1,
            sample_index=number % 2,
            prompt=f"prompt {number // 2}",
            messages='[{"role": "user", "content": "ü"}]',
            reference=None if number % 3 else f"reference {number}",
            format="messages",
        )


def sequence(row: PlanRow) -> SequenceRow:
    """The answer of a plan's row: a pure function of its row_key."""
    rng = np.random.default_rng(list(row.row_key))
    num_tokens = int(rng.integers(6, 14))
    return make_row(
        row_key=row.row_key,
        group_key=row.group_key,
        source=row.source,
        prompt=row.prompt,
        response="answer " + row.row_key.hex() + " ü",
        reference=row.reference,
        token_ids=rng.integers(0, VOCAB, num_tokens),
        spans=[(2, 4), (5, num_tokens)],
        finish_reason=("stop", "length", "given")[num_tokens % 3],
    )


def targets_of(row: SequenceRow, identity: LayerIdentity) -> SparseTargets:
    """Targets of a row in a layer: a pure function of its key."""
    rng = np.random.default_rng(list(row.key))
    counts = rng.integers(1, identity.k + 1, row.num_positions)
    return cut(rng, row.num_positions, VOCAB, counts, identity.temperatures, identity.draws).targets


def write_unit(writer: CacheWriter, job: Job, unit: int) -> None:
    """Commit the sequences of one unit; every seventh row is set aside."""
    rows = job.unit(unit)
    kept = [row for row in rows if row.line % 7]
    set_aside = [
        {"row_key": row.row_key.hex(), "source": row.source, "reason": "too long"} for row in rows if row.line % 7 == 0
    ]
    writer.write_sequences(job.part_stem(unit), [sequence(row) for row in kept], SOFTWARE, set_aside)


def score(layer: LayerWriter) -> None:
    """Commit targets for every part that has none."""
    for record in layer.missing():
        rows = layer.cache.read_sequences(record)
        layer.write(record.stem, [row.key for row in rows], [targets_of(row, layer.identity) for row in rows], SOFTWARE)


def build(
    path: Path, first: int = 0, last: int = 10, rows_per_part: int = 4, layers: tuple[LayerIdentity, ...] = (TOP,)
) -> CacheWriter:
    """Build a cache, or continue one that was interrupted, or add a job to it."""
    writer = CacheWriter.create_or_open(path, SEQUENCES, TOKENIZER)
    job = create_job(path, {"first": first, "last": last}, plan_rows(first, last), rows_per_part)
    opened = [LayerWriter.create_or_open(writer, None, identity, {"machine": "test"}) for identity in layers]
    done = {record.stem for record in writer.sequence_records()}
    for unit in range(job.num_units):
        if job.part_stem(unit) not in done:
            write_unit(writer, job, unit)
    for layer in opened:
        score(layer)
    return writer


def tree(path: Path) -> dict[str, bytes]:
    """Every file's bytes by relative name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


if __name__ == "__main__":
    build(Path(sys.argv[1]))

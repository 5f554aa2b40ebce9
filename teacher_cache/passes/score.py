"""Pass 2: every sequences part that a layer lacks is scored once, prefill only, and becomes a targets part.

Pass 3 (hidden_pass.py) goes the same way with another engine and another layer.

The engine is fed across parts without draining; encoding and compression run in the writer thread.
Cost: one part of sequences and its targets per part in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from shared.cache.layout import sequences_dir
from shared.cache.writing.layer_writer import LayerWriter, RowsWriter
from shared.errors import EngineError
from shared.keys import row_salt
from shared.models.no_numbers import NO_NUMBERS
from shared.parts.jobs import Job
from shared.parts.parts import open_part
from shared.parts.records import PartRecord
from shared.parts.sequences import SequenceRow
from teacher_cache.engines.protocol import Captured, Scored, ScoreRequest
from teacher_cache.passes.feeding import PassContext, feed_units
from teacher_cache.passes.summary import PassFigures


class ScoreUnit:
    """One part on its way through an engine."""

    def __init__(
        self,
        number: int,
        record: PartRecord,
        layer: RowsWriter[Any],
        software: Callable[[], Mapping[str, Any]],
        figures: PassFigures,
    ) -> None:
        """Remember the part; its rows are read when its first request is pulled."""
        self.number = number
        self._record = record
        self._layer = layer
        self._software = software
        self._figures = figures
        self._salts = isinstance(layer, LayerWriter) and layer.identity.draw_key == "row"
        self._rows: list[SequenceRow] = []
        self._kept: dict[int, Any] = {}

    def requests(self) -> Iterator[ScoreRequest]:
        """Yield one request per row."""
        self._rows = self._layer.cache.read_sequences(self._record)
        for index, row in enumerate(self._rows):
            salt = row_salt(row.row_key) if self._salts else 0
            yield ScoreRequest((self.number, index), self.number, row.token_ids, row.spans, salt)

    def take(self, index: int, result: Scored | Captured) -> int:
        """Keep one row's targets or hidden states and return the row's tokens.

        Raises:
            EngineError: they do not cover the row's positions, or are no numbers.
        """
        row = self._rows[index]
        kept = result.targets if isinstance(result, Scored) else result.hidden
        if kept.num_positions != row.num_positions:
            raise EngineError(
                f"{self._record.stem}:{index}: the engine returned {kept.num_positions:,} positions for a row of "
                f"{row.num_positions:,}; report this as a defect of the engine"
            )
        if any(np.isnan(values).any() for values in _values_of(result)):
            raise EngineError(f"{self._record.stem}:{index}: {NO_NUMBERS}")
        self._kept[index] = kept
        self._figures.rows += 1
        self._figures.positions += row.num_positions
        return len(row.token_ids)

    def commit(self) -> Callable[[], object]:
        """Return the write that commits the part."""
        keys = [row.key for row in self._rows]
        kept: list[Any] = [self._kept[index] for index in range(len(self._rows))]
        return partial(self._layer.write, self._record.stem, keys, kept, self._software())


def _values_of(result: Scored | Captured) -> tuple[NDArray[Any], ...]:
    """Return what a model computed for a row."""
    if isinstance(result, Captured):
        return (result.hidden.states.scales,)
    targets = result.targets
    return targets.logprobs, targets.label_logprobs, targets.tail_logmass


def parts_to_score(
    layer: RowsWriter[Any], job: Job | None, partition: tuple[int, int], max_model_len: int
) -> list[PartRecord]:
    """Return the parts that this process scores: of its own job by unit, of older jobs by a hash of the name.

    Args:
        layer: the targets or hidden layer, which lacks them.
        job: this build's; None where there is none.
        partition: (index, count).
        max_model_len: longest row in tokens that the teacher takes.

    Raises:
        EngineError: a row is longer, with part and row.
    """
    index, count = partition
    own = frozenset(job.part_stem(unit) for unit in range(index, job.num_units, count)) if job else frozenset[str]()

    def is_mine(record: PartRecord) -> bool:
        if job is not None and record.id8 == job.id8:
            return record.stem in own
        return xxhash.xxh3_64_intdigest(record.stem.encode()) % count == index

    records = [record for record in layer.missing() if is_mine(record)]
    for record in records:
        part = open_part(sequences_dir(layer.cache.path), record, verify=False)
        lengths = pc.list_value_length(part.column("token_ids"))  # reads offsets only
        longest = pc.max(lengths).as_py() or 0
        if longest > max_model_len:
            row = pc.index(lengths, longest).as_py()
            raise EngineError(
                f"{record.stem}:{row}: the row has {longest:,} tokens and the teacher takes {max_model_len:,}; raise "
                "its `max_model_len` in the recipe, or score this cache with a teacher that takes longer sequences"
            )
    return records


def score_parts(
    layer: RowsWriter[Any],
    records: Sequence[PartRecord],
    serve: Callable[[Iterator[ScoreRequest]], Iterator[Any]],
    software: Callable[[], Mapping[str, Any]],
    context: PassContext,
    figures: PassFigures,
    phase: str = "score",
) -> None:
    """Score or capture these parts with an engine, and commit each."""
    context.progress.start(phase, sum(record.rows for record in records))
    units = (ScoreUnit(number, record, layer, software, figures) for number, record in enumerate(records))
    feed_units(units, serve, context, figures)
    context.progress.finish()

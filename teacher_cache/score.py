"""Pass 2: every sequences part that a layer lacks is scored once, prefill only, and becomes a targets part.

The engine is fed across parts without draining; encoding and compression run in the writer thread.
Cost: one part of sequences and its targets per part in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow.compute as pc
import xxhash

from shared.cache_writer import LayerWriter
from shared.errors import EngineError
from shared.layout import sequences_dir
from shared.parts import PartRecord, open_part
from shared.sequences import SequenceRow
from shared.targets import SparseTargets
from teacher_cache.engines.protocol import Scored, ScoreRequest
from teacher_cache.feeding import Desk, feed_units
from teacher_cache.summary import BuildSummary


class ScoreUnit:
    """One part on its way through an engine."""

    def __init__(
        self, number: int, record: PartRecord, layer: LayerWriter, software: Callable[[], Mapping[str, Any]], summary: BuildSummary
    ) -> None:
        """Remember the part; its rows are read when its first request is pulled."""
        self.number = number
        self._record = record
        self._layer = layer
        self._software = software
        self._summary = summary
        self._rows: list[SequenceRow] = []
        self._targets: dict[int, SparseTargets] = {}

    def requests(self) -> Iterator[ScoreRequest]:
        """Yield one request per row."""
        self._rows = self._layer.read_sequences(self._record)
        for index, row in enumerate(self._rows):
            yield ScoreRequest((self.number, index), self.number, row.token_ids, row.spans)

    def take(self, index: int, result: Scored) -> int:
        """Keep one row's targets and return the row's tokens.

        Raises:
            EngineError: the targets do not cover the row's positions.
        """
        row = self._rows[index]
        if result.targets.num_positions != row.num_positions:
            raise EngineError(
                f"{self._record.stem}:{index}: the engine returned {result.targets.num_positions:,} positions for a row of "
                f"{row.num_positions:,}; report this as a defect of the engine"
            )
        self._targets[index] = result.targets
        self._summary.scored.rows += 1
        self._summary.scored.positions += row.num_positions
        return len(row.token_ids)

    def commit(self) -> Callable[[], object]:
        """Return the write that commits the part."""
        keys = [row.key for row in self._rows]
        targets = [self._targets[index] for index in range(len(self._rows))]
        return partial(self._layer.write, self._record.stem, keys, targets, self._software())


def parts_to_score(layer: LayerWriter, own_stems: frozenset[str], id8: str | None, partition: tuple[int, int]) -> list[PartRecord]:
    """Return the parts that this process scores: of its own job by unit, of older jobs by a hash of the name.

    Args:
        layer: the targets layer.
        own_stems: parts of this job's units that belong to this partition.
        id8: first 8 digits of this job; None where there is none.
        partition: (index, count).
    """
    index, count = partition

    def is_mine(record: PartRecord) -> bool:
        if record.id8 == id8:
            return record.stem in own_stems
        return xxhash.xxh3_64_intdigest(record.stem.encode()) % count == index

    return [record for record in layer.missing() if is_mine(record)]


def require_length(layer: LayerWriter, records: Sequence[PartRecord], max_model_len: int) -> None:
    """Refuse parts with a row that is longer than the teacher takes; reads offsets only.

    Raises:
        EngineError: with part and row.
    """
    directory = sequences_dir(layer.directory.parents[1])
    for record in records:
        lengths = pc.list_value_length(open_part(directory, record, verify=False).column("token_ids"))
        longest = pc.max(lengths).as_py() or 0
        if longest > max_model_len:
            row = pc.index(lengths, longest).as_py()
            raise EngineError(
                f"{record.stem}:{row}: the row has {longest:,} tokens and the teacher takes {max_model_len:,}; raise "
                "`teacher.max_model_len`, or score this cache with a teacher that takes longer sequences"
            )


def score_parts(
    layer: LayerWriter,
    records: Sequence[PartRecord],
    serve: Callable[[Iterator[ScoreRequest]], Iterator[Scored]],
    software: Callable[[], Mapping[str, Any]],
    desk: Desk,
    summary: BuildSummary,
) -> None:
    """Score these parts with an engine, and commit each."""
    desk.progress.start("score", sum(record.rows for record in records))
    units = (ScoreUnit(number, record, layer, software, summary) for number, record in enumerate(records))
    feed_units(units, serve, desk, summary.scored)
    desk.progress.finish()

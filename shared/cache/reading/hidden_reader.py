"""Hidden states of the rows that a cache shows, from the mapped parts of one hidden layer.

Cost per row: the bytes of its blob and one decompression; at most 64 parts are open, 16 of a mirror. Threads may share
a reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cache.layout import HiddenLayer, choose_layer, list_hidden_layers
from shared.errors import CacheError
from shared.parts.mapped_part import MappedBlobs
from shared.parts.open_parts import OpenParts
from shared.parts.parts import check_file
from shared.parts.records import PartRecord, check_counts, list_records
from shared.parts.sequences import SequenceRow
from shared.payload.hidden import HiddenStates


class HiddenReader:
    """The parts of a hidden layer that belong to a list of sequences parts."""

    def __init__(self, layer: HiddenLayer, sequences: Sequence[PartRecord], verify: bool = False) -> None:
        """Find the part of each sequences part.

        Args:
            layer: the hidden layer.
            sequences: records of the sequences parts that are read, in order.
            verify: compare every part with its checksum first.

        Raises:
            CacheError: the layer does not cover one of them.
            DamagedError: a part is not what was committed.
        """
        covered = {record.stem: record for record in list_records(layer.directory)}
        missing = [record for record in sequences if record.stem not in covered]
        if missing:
            raise CacheError(
                f"{layer.directory} lacks hidden states of {sum(record.rows for record in missing):,} rows in "
                f"{len(missing):,} parts; finish it with 'decant teach' or choose another layer"
            )
        self.layer = layer
        self.records = [covered[record.stem] for record in sequences]
        for record, hidden in zip(sequences, self.records, strict=True):
            check_counts(layer.directory, hidden, record)
            if verify:
                check_file(layer.directory, hidden)
        self._codec = layer.identity.make_codec()
        self._parts: OpenParts[MappedBlobs] = OpenParts(layer.directory, self._open)

    @classmethod
    def of(cls, cache: Path, hidden: str | bool, sequences: Sequence[PartRecord], verify: bool) -> HiddenReader | None:
        """Return the reader of a cache's hidden layer by name, of the only one (True), or None (False).

        Raises:
            CacheError: there is no such layer, or it does not cover every row.
        """
        if hidden is False:
            return None
        layer = choose_layer(list_hidden_layers(cache), None if hidden is True else hidden, cache, "hidden")
        if layer is None:
            raise CacheError(
                f"{cache} has no hidden layer; add `capture.hidden` to the recipe that built it and run 'decant teach' "
                "again: it generates and scores nothing a second time"
            )
        return cls(layer, sequences, verify)

    def read(self, number: int, local: int, row: SequenceRow) -> HiddenStates:
        """Return the hidden states of row `local` of part `number`, whose sequence is `row`.

        Raises:
            DamagedError: they are not what was committed.
        """
        return self._parts.get(number).content(local, row, self._codec.decode)

    def stats(self) -> dict[str, Any]:
        """Return sizes of the layer's parts, from their records."""
        num_bytes = sum(record.bytes for record in self.records)
        return {
            "hidden_bytes": num_bytes,
            "hidden_bytes_per_position": num_bytes / max(sum(record.positions for record in self.records), 1),
        }

    def _open(self, number: int) -> MappedBlobs:
        return MappedBlobs(self.layer.directory, self.records[number], verify=False)

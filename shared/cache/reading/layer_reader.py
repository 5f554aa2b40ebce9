"""Targets or hidden states of the rows that a cache shows, from the mapped parts of one layer.

Cost per row: the bytes of its blob and one decompression; at most 64 parts are open, 16 of a mirror. Threads may share
a reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from shared.cache.layout import AnyLayer, HiddenLayer, choose_layer, list_hidden_layers
from shared.errors import CacheError
from shared.parts.mapped_part import MappedBlobs
from shared.parts.open_parts import OpenParts
from shared.parts.parts import check_file
from shared.parts.records import PartRecord, check_counts, list_records
from shared.parts.sequences import SequenceRow
from shared.payload.codec import Codec
from shared.payload.hidden_codec import HiddenCodec


class LayerReader(Generic[AnyLayer]):
    """The parts of a layer that belong to a list of sequences parts."""

    def __init__(
        self, layer: AnyLayer, covered: Mapping[str, PartRecord], sequences: Sequence[PartRecord], verify: bool
    ) -> None:
        """Find the part of each sequences part, all of which the layer has `covered`.

        Raises:
            DamagedError: a part has other rows than its record, or, with `verify`, another checksum.
        """
        self.layer: AnyLayer = layer
        self.records = [covered[record.stem] for record in sequences]
        for record, own in zip(sequences, self.records, strict=True):
            check_counts(layer.directory, own, record)
            if verify:
                check_file(layer.directory, own)
        self._codec: Codec | HiddenCodec = layer.identity.make_codec()
        self._parts: OpenParts[MappedBlobs] = OpenParts(layer.directory, self._open)

    def read(self, number: int, local: int, row: SequenceRow) -> Any:
        """Return the targets or hidden states of row `local` of part `number`, whose sequence is `row`.

        Raises:
            DamagedError: they are not what was committed.
        """
        return self._parts.get(number).content(local, row, self._codec.decode)

    def _open(self, number: int) -> MappedBlobs:
        return MappedBlobs(self.layer.directory, self.records[number], verify=False)


def records_by_stem(directory: Path) -> dict[str, PartRecord]:
    """Return the records of a directory's committed parts by stem; errors as for `list_records`."""
    return {record.stem: record for record in list_records(directory)}


def hidden_reader(
    cache: Path, hidden: str | bool, sequences: Sequence[PartRecord], verify: bool
) -> LayerReader[HiddenLayer] | None:
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
    covered = records_by_stem(layer.directory)
    missing = [record for record in sequences if record.stem not in covered]
    if missing:
        raise CacheError(
            f"{layer.directory} lacks hidden states of {sum(record.rows for record in missing):,} rows in "
            f"{len(missing):,} parts; finish it with 'decant teach' or choose another layer"
        )
    return LayerReader(layer, covered, sequences, verify)

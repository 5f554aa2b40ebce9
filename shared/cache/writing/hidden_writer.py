"""Write a hidden layer of a cache: one part of hidden states per part of sequences. Reading is shared/cache/cache.py.

Cost: quantised states are split into planes and compressed, about 200 MB per second and core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from shared.cache.layout import HiddenLayer
from shared.cache.writing.layer_writer import GrowingCache, RowsWriter, new_or_known_layer
from shared.identity.hidden_identity import HiddenIdentity
from shared.parts.records import PartRecord
from shared.payload.hidden import HiddenStates
from shared.schema import HIDDEN


class HiddenWriter(RowsWriter):
    """A hidden layer that grows."""

    def __init__(self, cache: GrowingCache, layer: HiddenLayer) -> None:
        """Use `create_or_open`."""
        super().__init__(cache, layer)
        self.identity = layer.identity
        self._codec = layer.identity.make_codec()

    @classmethod
    def create_or_open(
        cls,
        cache: GrowingCache,
        name: str | None,
        identity: HiddenIdentity,
        provenance: Mapping[str, Any],
        *,
        make: bool = True,
    ) -> HiddenWriter:
        """Create a hidden layer, or open the one of the same identity; arguments and errors as for
        `CacheWriter.layer`.
        """
        writer = cls(cache, new_or_known_layer(cache, HiddenLayer, name, identity, provenance))
        if make:
            writer.make()
        return writer

    def write(
        self, stem: str, keys: Sequence[bytes], hidden: Sequence[HiddenStates], software: Mapping[str, Any]
    ) -> PartRecord:
        """Commit the hidden states of one sequences part; a part that is committed already is left as it is.

        Args:
            stem: the sequences part's stem.
            keys: `key` of each of its rows, in order.
            hidden: the hidden states of each.
            software: versions of what made them.

        Raises:
            ValueError: the keys are not those of the sequences part, or the states contradict the layer.
            CacheError: the disk is full or the directory cannot be written.
        """
        positions = [row.num_positions for row in hidden]
        self.check_rows(stem, keys, positions)
        blobs = [self._codec.encode(row) for row in hidden]
        return self.commit(stem, hidden_table(keys, positions, blobs), hidden_stats(positions, blobs), software)


def hidden_table(keys: Sequence[bytes], num_positions: Sequence[int], blobs: Sequence[bytes]) -> pa.Table:
    """Return the table of a hidden part."""
    columns = {"key": list(keys), "num_positions": list(num_positions), "blob": list(blobs)}
    return pa.Table.from_arrays([pa.array(columns[field.name], type=field.type) for field in HIDDEN], schema=HIDDEN)


def hidden_stats(num_positions: Sequence[int], blobs: Sequence[bytes]) -> dict[str, Any]:
    """Return the figures that the record of a hidden part keeps."""
    return {"rows": len(blobs), "positions": sum(num_positions), "blob_bytes": sum(map(len, blobs))}

"""Write a targets layer or a hidden layer of a cache: a part for each part of sequences. Reading is
shared/cache/cache.py.

Nothing here needs a lock: layer.json is created by exclusive link before the first part and compared afterwards,
parts are committed by shared/parts/parts.py. So a build whose engine does not start leaves no empty layer behind.
Cost: encoding runs at about half a million positions of 64 entries per second and core; quantised states are split into
planes and compressed, about 200 MB per second and core.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

from shared.atomic import link_exclusive, make_dir
from shared.cache.layout import HiddenLayer, Layer, sequences_dir
from shared.cache.writing.cache_writer import CacheWriter
from shared.errors import CacheError, IdentityError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import LayerIdentity, difference
from shared.keys import stack_keys
from shared.parts.mapped_part import MappedSequences
from shared.parts.part_stats import targets_stats
from shared.parts.parts import commit_part
from shared.parts.records import PartRecord, read_record, sealed_json
from shared.payload.hidden import HiddenStates
from shared.payload.targets import SparseTargets
from shared.schema import FORMAT_VERSION, HIDDEN, LAYER_NAME_PATTERN, STEM_PATTERN, TARGETS

Contents = TypeVar("Contents", SparseTargets, HiddenStates)


def write_layer(layer: Layer | HiddenLayer) -> None:
    """Create a layer's directory and its layer.json where they are not there.

    Raises:
        DamagedError: a layer.json is there that contradicts the directory's name.
        CacheError: it cannot be written.
    """
    path = layer.directory / "layer.json"
    if path.exists():
        return
    make_dir(layer.directory.parent)
    make_dir(layer.directory)
    document = {"format": FORMAT_VERSION, "identity": layer.identity.to_json(), "provenance": layer.provenance}
    link_exclusive(path, sealed_json(document), "layer_json")
    type(layer).read(layer.directory)


class RowsWriter(ABC, Generic[Contents]):
    """A layer that grows: what its directory covers, part by part."""

    kind: ClassVar[type[Layer] | type[HiddenLayer]]

    def __init__(self, cache: CacheWriter, layer: Layer | HiddenLayer) -> None:
        """Take the cache and the layer, which need not be on disk; else use `create_or_open`."""
        self.cache = cache
        self.layer, self.identity = layer, layer.identity
        self.directory = layer.directory
        self.name = layer.full_name

    @classmethod
    def create_or_open(
        cls,
        cache: CacheWriter,
        name: str | None,
        identity: LayerIdentity | HiddenIdentity,
        provenance: Mapping[str, Any],
        *,
        make: bool = True,
    ) -> Self:
        """Create a layer, or open the one of the same identity whatever its name.

        Args:
            cache: whose layer it is.
            name: short name; None for the identity's own.
            identity: what the layer is.
            provenance: versions and machine of the first creation; recorded, never compared.
            make: create a new one now; False: with its first part.

        Raises:
            IdentityError: its tokenizer is not the cache's, or `name` belongs to a layer of another identity.
            CacheError: a name that cannot be one.
        """
        if identity.tokenizer_hash != cache.identity.tokenizer_hash:
            raise IdentityError(
                f"{cache.path} cannot be scored by {identity.teacher}: its tokenizer is {identity.tokenizer_hash} and "
                f"the cache's {cache.identity.tokenizer_hash}; use a teacher with the cache's tokenizer or another "
                "cache"
            )
        if name is not None and not LAYER_NAME_PATTERN.fullmatch(name):
            raise CacheError(f"{name!r} cannot name a layer; expected lower-case letters, digits, '.', '_', '+' or '-'")
        identity.make_codec()
        layers = cls.kind.all_of(cache.path)
        for layer in layers.values():
            if layer.identity.hash8 == identity.hash8:
                if name not in (None, layer.short_name, layer.full_name):
                    raise CacheError(
                        f"{cache.path} holds this capture as layer {layer.full_name} already; leave out {name!r}"
                    )
                return cls(cache, layer)
        taken = next((layer for layer in layers.values() if layer.short_name == name), None)
        if taken is not None:
            raise IdentityError(
                f"layer {taken.full_name} of {cache.path} cannot be extended: {difference(taken.identity, identity)}"
            )
        short = name or re.sub(r"[^a-z0-9._+-]", "-", identity.name)
        directory = cache.path / cls.kind.kind / f"{short}-{identity.hash8}"
        layer = cls.kind(directory, dict(provenance), identity)  # type: ignore[arg-type]  # one of its kind
        if make:
            write_layer(layer)
        return cls(cache, layer)

    def write(
        self,
        stem: str,
        keys: Sequence[bytes],
        contents: Sequence[Contents],
        software: Mapping[str, Any],
        figures: Mapping[str, float] = MappingProxyType({}),
    ) -> PartRecord:
        """Commit what the layer has of one sequences part; a part that is committed already is left as it is.

        The layer is made before it, and once more where a clean-up took an empty one meanwhile.

        Args:
            stem: the sequences part's stem.
            keys: `key` of each of its rows, in order.
            contents: the targets or the hidden states of each.
            software: versions of what made them.
            figures: further sums for the record.

        Raises:
            ValueError: the keys are not those of the sequences part, or contents contradict the layer.
            CacheError: the disk is full or the directory cannot be written.
        """
        positions = [row.num_positions for row in contents]
        self._check_rows(stem, keys, positions)
        table, stats = self._encoded(keys, positions, contents)
        write_layer(self.layer)
        record = commit_part(self.directory, stem, table, {**stats, **figures}, software, ())
        write_layer(self.layer)
        return record

    def missing(self) -> list[PartRecord]:
        """Return the records of sequences parts that this layer does not cover, by stem."""
        covered = {path.stem for path in self.directory.glob("part-*.json")}
        return [record for record in self.cache.sequence_records() if record.stem not in covered]

    @abstractmethod
    def _encoded(
        self, keys: Sequence[bytes], num_positions: Sequence[int], contents: Sequence[Contents]
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Return the table of a part, and the figures of its record."""

    def _check_rows(self, stem: str, keys: Sequence[bytes], num_positions: Sequence[int]) -> None:
        """Compare what is to be committed with its sequences part.

        Raises:
            ValueError: other keys, or another number of positions, than the sequences part has.
        """
        record_path = sequences_dir(self.cache.path) / f"{stem}.json"
        if not STEM_PATTERN.fullmatch(stem) or not record_path.exists() or len(keys) != len(num_positions):
            raise ValueError(
                f"{stem} is not a committed sequences part, or {len(keys)} keys came with {len(num_positions)} rows"
            )
        record = read_record(record_path)
        part = MappedSequences(sequences_dir(self.cache.path), record, verify=False)
        if not np.array_equal(part.keys, stack_keys(list(keys))):
            raise ValueError(f"the keys for {stem} are not those of its {len(part)} rows in order")
        if sum(num_positions) != record.positions:
            raise ValueError(
                f"what is given for {stem} has {sum(num_positions)} positions where its rows have {record.positions}"
            )


class LayerWriter(RowsWriter[SparseTargets]):
    """A targets layer that grows."""

    kind = Layer
    identity: LayerIdentity

    def _encoded(
        self, keys: Sequence[bytes], num_positions: Sequence[int], contents: Sequence[SparseTargets]
    ) -> tuple[pa.Table, dict[str, Any]]:
        blobs = self.identity.make_codec().encode_rows(contents)
        nll = [float(-row.label_logprobs.sum(dtype=np.float64)) for row in contents]
        table = part_table(TARGETS, keys, num_positions, nll, blobs)
        return table, targets_stats(contents, sum(map(len, blobs)))


class HiddenWriter(RowsWriter[HiddenStates]):
    """A hidden layer that grows."""

    kind = HiddenLayer
    identity: HiddenIdentity

    def _encoded(
        self, keys: Sequence[bytes], num_positions: Sequence[int], contents: Sequence[HiddenStates]
    ) -> tuple[pa.Table, dict[str, Any]]:
        codec = self.identity.make_codec()
        blobs = [codec.encode(row) for row in contents]
        stats = {"rows": len(blobs), "positions": sum(num_positions), "blob_bytes": sum(map(len, blobs))}
        return part_table(HIDDEN, keys, num_positions, blobs), stats


def part_table(schema: pa.Schema, *columns: Sequence[Any]) -> pa.Table:
    """Return the table of a part, a value per row in each column."""
    arrays = [pa.array(values, type=column.type) for column, values in zip(schema, columns, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)

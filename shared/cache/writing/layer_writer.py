"""What writers of targets and of hidden layers share: where the directory comes from, which parts are missing, whose
rows they are.

Nothing here needs a lock: layer.json is created by exclusive link before the first part and compared afterwards,
parts are committed by shared/parts/parts.py. So a build whose engine does not start leaves no empty layer behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from shared.atomic import link_exclusive, make_dir
from shared.cache.layout import AnyLayer, HiddenLayer, Layer, sequences_dir
from shared.errors import CacheError, IdentityError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import LayerIdentity, SequencesIdentity, difference
from shared.keys import stack_keys
from shared.parts.mapped_part import MappedSequences
from shared.parts.parts import commit_part
from shared.parts.records import PartRecord, read_record, sealed_json
from shared.parts.sequences import SequenceRow
from shared.schema import FORMAT_VERSION, LAYER_NAME_PATTERN, STEM_PATTERN


class GrowingCache(Protocol):
    """What a layer's writer asks of its cache."""

    path: Path
    identity: SequencesIdentity

    def sequence_records(self) -> list[PartRecord]:
        """Return the records of committed sequences parts, by stem."""
        ...

    def read_sequences(self, record: PartRecord) -> list[SequenceRow]:
        """Return the rows of a committed part after comparing it with its checksum."""
        ...


def new_or_known_layer(
    cache: GrowingCache,
    kind: type[AnyLayer],
    name: str | None,
    identity: LayerIdentity | HiddenIdentity,
    provenance: Mapping[str, Any],
) -> AnyLayer:
    """Return the layer of an identity whatever its name, or describe a new one, which `RowsWriter.make` creates.

    Args:
        cache: whose layer it is.
        kind: of layers.
        name: short name; None for the identity's own.
        identity: what the layer is.
        provenance: versions and machine of the first creation; recorded, never compared.

    Raises:
        IdentityError: its tokenizer is not the cache's, or `name` belongs to a layer of another identity.
        CacheError: a name that cannot be one.
    """
    if identity.tokenizer_hash != cache.identity.tokenizer_hash:
        raise IdentityError(
            f"{cache.path} cannot be scored by {identity.teacher}: its tokenizer is {identity.tokenizer_hash} and the "
            f"cache's {cache.identity.tokenizer_hash}; use a teacher with the cache's tokenizer or another cache"
        )
    if name is not None and not LAYER_NAME_PATTERN.fullmatch(name):
        raise CacheError(f"{name!r} cannot name a layer; expected lower-case letters, digits, '.', '_', '+' or '-'")
    identity.make_codec()
    layers = kind.all_of(cache.path)
    for layer in layers.values():
        if layer.identity.hash8 == identity.hash8:
            if name not in (None, layer.short_name, layer.full_name):
                raise CacheError(
                    f"{cache.path} holds this capture as layer {layer.full_name} already; leave out {name!r}"
                )
            return layer
    taken = next((layer for layer in layers.values() if layer.short_name == name), None)
    if taken is not None:
        raise IdentityError(
            f"layer {taken.full_name} of {cache.path} cannot be extended: {difference(taken.identity, identity)}"
        )
    directory = cache.path / kind.kind / f"{name or re.sub(r'[^a-z0-9._+-]', '-', identity.name)}-{identity.hash8}"
    return kind(directory, dict(provenance), identity)  # type: ignore[arg-type]  # one of its kind


def write_layer(layer: Layer | HiddenLayer) -> None:
    """Create a layer's directory and its layer.json where they are not there; errors as for `RowsWriter.make`."""
    path = layer.directory / "layer.json"
    if path.exists():
        return
    make_dir(layer.directory.parent)
    make_dir(layer.directory)
    document = {"format": FORMAT_VERSION, "identity": layer.identity.to_json(), "provenance": layer.provenance}
    link_exclusive(path, sealed_json(document), "layer_json")
    type(layer).read(layer.directory)


class RowsWriter:
    """The rows that a layer's directory covers."""

    def __init__(self, cache: GrowingCache, layer: Layer | HiddenLayer) -> None:
        """Take the cache and the layer, which need not be on disk."""
        self.cache = cache
        self.directory = layer.directory
        self.name = layer.directory.name
        self._described = layer

    def make(self) -> None:
        """Create the layer's directory and its layer.json where they are not there.

        Raises:
            DamagedError: a layer.json is there that contradicts the directory's name.
            CacheError: it cannot be written.
        """
        write_layer(self._described)

    def commit(self, stem: str, table: pa.Table, stats: Mapping[str, Any], software: Mapping[str, Any]) -> PartRecord:
        """Commit a part; the layer is made before it, and once more where a clean-up took an empty one meanwhile."""
        self.make()
        record = commit_part(self.directory, stem, table, stats, software, ())
        self.make()
        return record

    def missing(self) -> list[PartRecord]:
        """Return the records of sequences parts that this layer does not cover, by stem."""
        covered = {path.stem for path in self.directory.glob("part-*.json")}
        return [record for record in self.cache.sequence_records() if record.stem not in covered]

    def read_sequences(self, record: PartRecord) -> list[SequenceRow]:
        """Return the rows of a committed sequences part; as `CacheWriter.read_sequences`."""
        return self.cache.read_sequences(record)

    def check_rows(self, stem: str, keys: Sequence[bytes], num_positions: Sequence[int]) -> None:
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

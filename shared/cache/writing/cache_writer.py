"""Write a cache: its identity, its sequences, its targets layers. Reading is shared/cache/cache.py.

Nothing here needs a lock: cache.json and layer.json are created by exclusive link and compared afterwards, parts are
committed by shared/parts/parts.py. Cost: encoding runs at about half a million positions of 64 entries per second and
core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shared.atomic import link_exclusive, make_dir, write_atomic
from shared.cache.layout import Layer, read_header, sequences_dir, tokenizer_path
from shared.cache.writing.layer_writer import RowsWriter, new_or_known_layer
from shared.errors import DamagedError, IdentityError
from shared.identity.identity import LayerIdentity, SequencesIdentity, difference
from shared.parts.cache_files import hash_file
from shared.parts.mapped_part import MappedSequences
from shared.parts.part_stats import sequences_stats, targets_stats
from shared.parts.parts import commit_part
from shared.parts.records import PartRecord, list_records, sealed_json
from shared.parts.sequences import SequenceRow, row_problem, rows_to_table
from shared.payload.targets import SparseTargets
from shared.schema import FORMAT_VERSION, TARGETS


class CacheWriter:
    """A cache that grows."""

    def __init__(self, path: Path, identity: SequencesIdentity) -> None:
        """Use `create_or_open`."""
        self.path = path
        self.identity = identity

    @classmethod
    def create_or_open(
        cls, path: Path, sequences: SequencesIdentity, tokenizer_files: Mapping[str, bytes]
    ) -> CacheWriter:
        """Create a cache, or open one whose identity is the same.

        Args:
            path: the cache's directory.
            sequences: identity of its sequences; licence and origin of the first creation are kept.
            tokenizer_files: file name -> bytes, what a student needs to use the tokenizer without its teacher.

        Raises:
            IdentityError: the cache holds sequences of another identity.
            CacheError: it cannot be written.
        """
        make_dir(path)
        described = {
            name: {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
            for name, data in tokenizer_files.items()
        }
        for name in described:
            tokenizer_path(path, name)
        document = {"format": FORMAT_VERSION, "identity": sequences.to_json(), "tokenizer_files": described}
        if not (path / "cache.json").exists():
            link_exclusive(path / "cache.json", sealed_json(document), "cache_json")
        header = read_header(path)
        differing = difference(header.identity, sequences)
        if differing:
            raise IdentityError(
                f"{path} cannot be extended: {differing}; use another cache directory or the same setting"
            )
        for name, entry in header.tokenizer_files.items():
            _restore_tokenizer_file(path, name, entry, tokenizer_files.get(name))
        for directory in (path / "jobs", sequences_dir(path), path / "targets"):
            make_dir(directory)
        return cls(path, header.identity)

    def layer(
        self, name: str | None, identity: LayerIdentity, provenance: Mapping[str, Any], *, make: bool = True
    ) -> LayerWriter:
        """Create a targets layer, or open the one of the same identity whatever its name.

        Args:
            name: short name; None for the identity's own.
            identity: teacher and capture.
            provenance: versions and machine of the first creation; recorded, never compared.
            make: create a new one now; False: with its first part.

        Raises:
            IdentityError: its tokenizer is not the cache's, or `name` belongs to a layer of another identity.
            CacheError: a name that cannot be one.
        """
        writer = LayerWriter(self, new_or_known_layer(self, Layer, name, identity, provenance))
        if make:
            writer.make()
        return writer

    def sequence_records(self) -> list[PartRecord]:
        """Return the records of committed sequences parts, by stem."""
        return list_records(sequences_dir(self.path))

    def write_sequences(
        self,
        stem: str,
        rows: Sequence[SequenceRow],
        software: Mapping[str, Any],
        set_aside: Sequence[Mapping[str, Any]] = (),
    ) -> PartRecord:
        """Commit the sequences of one unit; a unit that is committed already is left as it is.

        Args:
            stem: `Job.part_stem(unit)`.
            rows: the unit's rows that can be scored.
            software: versions of what made them.
            set_aside: rows of the unit that cannot be used, each with at least a `reason`.

        Raises:
            ValueError: a row contradicts the format or the vocabulary.
            CacheError: the disk is full or the directory cannot be written.
        """
        for number, row in enumerate(rows):
            problem = row_problem(row, self.identity.vocab_size)
            if problem:
                raise ValueError(f"row {number} of {stem}: {problem}")
        directory = sequences_dir(self.path)
        return commit_part(directory, stem, rows_to_table(rows), sequences_stats(rows), software, set_aside)

    def read_sequences(self, record: PartRecord) -> list[SequenceRow]:
        """Return the rows of a committed part after comparing it with its checksum.

        Raises:
            DamagedError: the part is not what was committed.
        """
        part = MappedSequences(sequences_dir(self.path), record, verify=True, vocab_size=self.identity.vocab_size)
        return [part.row(i) for i in range(len(part))]


class LayerWriter(RowsWriter):
    """A targets layer that grows."""

    def __init__(self, cache: CacheWriter, layer: Layer) -> None:
        """Use `CacheWriter.layer`."""
        super().__init__(cache, layer)
        self.layer = layer
        self.identity = layer.identity
        self._codec = layer.identity.make_codec()

    def write(
        self,
        stem: str,
        keys: Sequence[bytes],
        targets: Sequence[SparseTargets],
        software: Mapping[str, Any],
        figures: Mapping[str, float] = MappingProxyType({}),
    ) -> PartRecord:
        """Commit the targets of one sequences part; a part that is committed already is left as it is.

        Args:
            stem: the sequences part's stem.
            keys: `key` of each of its rows, in order.
            targets: the targets of each.
            software: versions of what made them.
            figures: further sums for the record.

        Raises:
            ValueError: the keys are not those of the sequences part, or targets contradict the layer.
            CacheError: the disk is full or the directory cannot be written.
        """
        self.check_rows(stem, keys, [row.num_positions for row in targets])
        blobs = self._codec.encode_rows(targets)
        nll = [float(-row.label_logprobs.sum(dtype=np.float64)) for row in targets]
        table = targets_table(keys, [row.num_positions for row in targets], nll, blobs)
        stats = targets_stats(targets, sum(map(len, blobs)))
        return self.commit(stem, table, {**stats, **figures}, software)


def targets_table(
    keys: Sequence[bytes], num_positions: Sequence[int], teacher_nll_nats: Sequence[float], blobs: Sequence[bytes]
) -> pa.Table:
    """Return the table of a targets part, a value per row in each column."""
    columns = (keys, num_positions, teacher_nll_nats, blobs)
    arrays = [pa.array(values, type=column.type) for column, values in zip(TARGETS, columns, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TARGETS)


def _restore_tokenizer_file(path: Path, name: str, entry: Mapping[str, Any], data: bytes | None) -> None:
    """Write a tokenizer file that a killed creation left out; leave one that is there."""
    target = tokenizer_path(path, name)
    if target.exists():
        if hash_file(target)[0] != entry["xxh3"]:
            raise DamagedError(
                f"{target} was altered after it was written; restore it or delete it to have it written again"
            )
        return
    if data is None or xxhash.xxh3_128_hexdigest(data) != entry["xxh3"]:
        raise IdentityError(
            f"{target} is missing and the tokenizer given has another file of that name; restore it from a copy"
        )
    make_dir(target.parent)
    write_atomic(target, data, "tokenizer")

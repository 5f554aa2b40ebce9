"""Write a cache: its identity and its sequences. Layers are layer_writer.py, reading is shared/cache/cache.py.

Nothing here needs a lock: cache.json is created by exclusive link and compared afterwards, parts are committed by
shared/parts/parts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shared.atomic import link_exclusive, make_dir, write_atomic
from shared.cache.layout import CacheHeader, read_header, sequences_dir, tokenizer_path
from shared.errors import DamagedError, IdentityError, ModelError
from shared.identity.identity import SequencesIdentity, difference
from shared.parts.cache_files import hash_file
from shared.parts.mapped_part import MappedSequences
from shared.parts.part_stats import sequences_stats
from shared.parts.parts import commit_part
from shared.parts.records import PartRecord, list_records, sealed_json
from shared.parts.sequences import SequenceRow, row_problem, rows_to_table
from shared.schema import FORMAT_VERSION, TOKENIZER_FILE_PATTERN


def require_same(path: Path, sequences: SequencesIdentity) -> CacheHeader:
    """Return the header of a cache that holds sequences of an identity.

    Raises:
        IdentityError: it holds those of another.
    """
    header = read_header(path)
    differing = difference(header.identity, sequences)
    if differing:
        raise IdentityError(f"{path} cannot be extended: {differing}; use another cache directory or the same setting")
    return header


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
            ModelError: a tokenizer's file has a name that a cache cannot hold.
            CacheError: it cannot be written.
        """
        described = {
            name: {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
            for name, data in tokenizer_files.items()
        }
        odd = next((name for name in described if not TOKENIZER_FILE_PATTERN.fullmatch(name)), None)
        if odd is not None:
            raise ModelError(
                f"the tokenizer has a file {odd!r}, whose name a cache cannot hold; in a copy of the model name it by "
                "letters, digits, '.', '_', '+' and '-', a letter or digit first, or take it out"
            )
        make_dir(path)
        document = {"format": FORMAT_VERSION, "identity": sequences.to_json(), "tokenizer_files": described}
        if not (path / "cache.json").exists():
            link_exclusive(path / "cache.json", sealed_json(document), "cache_json")
        header = require_same(path, sequences)
        for name, entry in header.tokenizer_files.items():
            _restore_tokenizer_file(path, name, entry, tokenizer_files.get(name))
        for directory in (path / "jobs", sequences_dir(path), path / "targets"):
            make_dir(directory)
        return cls(path, header.identity)

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

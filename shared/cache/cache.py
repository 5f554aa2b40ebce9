"""Read a cache: random access to rows and their targets, memory-mapped, checked at every read.

What is checked when a row is read: once per process the checksum of its sequences part; its content against its key;
its targets' key and number of positions against the sequence; the targets' frame by its checksum. `verify=True` checks
every part as a whole before the first row.

Memory: a few hundred bytes per part and at most 64 open parts of each kind (16 of a mirror), whatever the cache's size;
`num_tokens`, `group_keys` and `sources` take 24 bytes per row once one of them is asked for, and read no token. A cache
pickles as its path, layer and parts, so every process reads the same rows, also when the cache has grown in between.

Shape letters: R rows shown, T tokens of a row, S its supervised positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise, starmap
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.cache.layout import Layer, choose_layer, list_layers, read_header, sequences_dir
from shared.cache.reading.cache_stats import summed_stats
from shared.cache.reading.layer_reader import LayerReader, hidden_reader, records_by_stem
from shared.cache.reading.part_columns import part_columns
from shared.cache.reading.visible_rows import hidden_rows
from shared.cache.sync.mirror import bring_if_remote
from shared.errors import CacheError, DamagedError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.parts.cache_files import read_bounded
from shared.parts.jobs import list_jobs
from shared.parts.mapped_part import MappedSequences
from shared.parts.open_parts import OpenParts
from shared.parts.part_file import part_file
from shared.parts.parts import check_file
from shared.parts.records import PartRecord, list_records
from shared.parts.sequences import SequenceRow
from shared.payload.hidden import HiddenStates
from shared.payload.narrowing import LayerView, Narrowing, narrow
from shared.payload.targets import SparseTargets
from shared.places import origin_of, place_of
from shared.schema import MAX_JSON_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Row(SequenceRow):
    """One row with its targets."""

    targets: SparseTargets | None = None
    """None where the cache was opened without a targets layer."""
    hidden: HiddenStates | None = None
    """None where the cache was opened without a hidden layer."""


class ReadPart(NamedTuple):
    """One part that a cache reads."""

    record: PartRecord
    targets: PartRecord | None
    """Record of its targets; None without a targets layer."""
    shown: NDArray[np.bool_] | None
    """[record.rows] which of its rows are shown; None: all."""
    rows: range
    """Where they are in the cache."""


_columns_of = attrgetter(*(column.name for column in fields(SequenceRow)))


class Cache:
    """A cache opened for reading; a sequence of rows. Threads may share it, processes may fork or pickle it."""

    def __init__(
        self,
        path: Path,
        records: list[PartRecord],
        layer: Layer | None,
        scored: Mapping[str, PartRecord],
        verify: bool,
        narrowing: Narrowing | None,
        hidden: str | bool,
    ) -> None:
        """Use `Cache.open`."""
        for record in records if verify else ():
            check_file(sequences_dir(path), record)
        self.path, self._records, self._narrowing = path, records, narrowing
        self._targets = None if layer is None else LayerReader(layer, scored, records, verify)
        self._hidden = hidden_reader(path, hidden, records, verify)
        self._layers = [reader for reader in (self._targets, self._hidden) if reader is not None]
        self.sequences_identity: SequencesIdentity = read_header(path).identity
        for other in (reader.layer for reader in self._layers):
            if other.identity.tokenizer_hash != self.sequences_identity.tokenizer_hash:
                raise DamagedError(
                    f"{other.directory / 'layer.json'} says tokenizer {other.identity.tokenizer_hash} where "
                    f"{path / 'cache.json'} says {self.sequences_identity.tokenizer_hash}; one of them was altered: "
                    "restore it from a copy"
                )
        self._masks = hidden_rows(path, self._records)
        self._shown = [self._masks[r.stem].nonzero()[0] if r.stem in self._masks else None for r in self._records]
        rows = [r.rows if shown is None else len(shown) for r, shown in zip(self._records, self._shown, strict=True)]
        self._ends = np.cumsum(rows, dtype=np.int64).tolist()
        self._checked = bytearray(len(self._records))
        self._sequences: OpenParts[MappedSequences] = OpenParts(path, self._open_sequences)

    @classmethod
    def open(
        cls,
        path: Path | str,
        targets: str | LayerView | None = None,
        verify: bool = False,
        allow_partial: bool = False,
        hidden: str | bool = False,
    ) -> Cache:
        """Open a cache.

        Args:
            path: its directory or URL.
            targets: NAME or NAME-HASH8 of a targets layer, or a view that narrows one; None for the only one.
            verify: compare every part with its checksum first (reads everything once).
            allow_partial: leave out rows that the layer has not scored yet, instead of refusing.
            hidden: NAME or NAME-HASH8 of a hidden layer, True for the only one, False to read no hidden states.

        Raises:
            CacheError: no cache, no such layer, several layers and none named, or rows without targets or hidden
                states.
            DamagedError: something on disk contradicts the format.
        """
        path = place_of(path)
        bring_if_remote(path)
        read_header(path)
        narrowing = targets.narrowing if isinstance(targets, LayerView) else None
        layer = choose_layer(list_layers(path), targets.name if isinstance(targets, LayerView) else targets, path)
        if layer is not None and narrowing is not None and not _can_narrow(layer.identity, narrowing):
            raise CacheError(
                f"{path}: layer {layer.full_name} does not hold what is asked for ({targets}); score another layer"
            )
        records = list_records(sequences_dir(path))
        scored: dict[str, PartRecord] = {}
        if layer is not None:
            scored = records_by_stem(layer.directory)
            missing = [record for record in records if record.stem not in scored]
            if missing and not allow_partial:
                raise CacheError(
                    f"{path} has {sum(r.rows for r in missing)} rows in {len(missing)} parts that layer "
                    f"{layer.full_name} has not scored; finish it with 'decant teach' or choose another layer"
                )
            records = [record for record in records if record.stem in scored]
        return cls(path, records, layer, scored, verify, narrowing, hidden)

    @classmethod
    def open_sequences(cls, path: Path | str, verify: bool = False, hidden: str | bool = False) -> Cache:
        """Open the rows of a cache without targets, however many layers it has; arguments and errors as for `open`."""
        path = place_of(path)
        bring_if_remote(path)
        read_header(path)
        return cls(path, list_records(sequences_dir(path)), None, {}, verify, None, hidden)

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[Any, ...]]:
        """Pickle as path, layers, parts and narrowing."""
        stems = tuple(record.stem for record in self._records)
        return _reopen, (str(self.path), self.layer_name, stems, self.cache_id, self._narrowing, self.hidden_name)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Return row `index` with its targets.

        Raises:
            IndexError: there is no such row.
            DamagedError: the row is not what was committed.
        """
        number, local = self._locate(index)
        row = self._sequences.get(number).row(local)
        targets = None if self._targets is None else self.targets_of(index, row)
        hidden = None if self._hidden is None else self._hidden.read(number, local, row)
        values = (*_columns_of(row), targets, hidden)
        return Row(*values)

    def targets_of(self, index: int, row: SequenceRow) -> SparseTargets:
        """Return the targets of row `index`, whose sequence is read already; the cache was opened with a layer.

        Raises:
            DamagedError: they are not of that row, or not what was committed.
        """
        assert self._targets is not None
        targets: SparseTargets = self._targets.read(*self._locate(index), row)
        if self._narrowing is not None:
            targets = narrow(targets, self._narrowing)
        if self._targets.layer.identity.tail == "unknown":
            targets = replace(targets, tail_logmass=np.full_like(targets.tail_logmass, np.nan))
        return targets

    def sequence(self, index: int) -> SequenceRow:
        """Return row `index` without decoding its targets; errors as for `cache[index]`."""
        number, local = self._locate(index)
        return self._sequences.get(number).row(local)

    def parts(self) -> list[ReadPart]:
        """Return the parts that are read, in order."""
        targets: Sequence[PartRecord | None] = self._targets.records if self._targets else [None] * self.num_parts
        masks, ranges = (
            (self._masks.get(record.stem) for record in self._records),
            starmap(range, pairwise([0, *self._ends])),
        )
        return list(map(ReadPart, self._records, targets, masks, ranges))

    @property
    def num_parts(self) -> int:
        """Parts that are read."""
        return len(self._records)

    def fetch_part(self, number: int) -> None:
        """Bring what is read of part `number` to this machine; nothing where it is here.

        Raises:
            CacheError: it cannot be fetched, or is not what was committed.
        """
        for directory, record in self._files_of(number):
            part_file(directory, record)

    def bytes_to_keep(self, number: int) -> dict[Path, int]:
        """Return the bytes of each file that this machine's store keeps while part `number` is read; no file of a
        directory.
        """
        files = {directory / f"{record.stem}.arrow": record.bytes for directory, record in self._files_of(number)}
        return {path: size for path, size in files.items() if origin_of(path) is not None and not path.exists()}

    def _files_of(self, number: int) -> list[tuple[Path, PartRecord]]:
        """Return folder and record of each file that is read of part `number`."""
        layers = ((reader.layer.directory, reader.records[number]) for reader in self._layers)
        return [(sequences_dir(self.path), self._records[number]), *layers]

    def where(self, index: int) -> str:
        """Return part:row of a row, for messages."""
        number, local = self._locate(index)
        return f"{sequences_dir(self.path) / self._records[number].stem}.arrow:{local}"

    @property
    def layer(self) -> LayerIdentity | None:
        """Identity of the targets as they are read, narrowed where they are; None where no layer was opened."""
        if self._targets is None:
            return None
        identity = self._targets.layer.identity
        return replace(identity, k=self._narrowing.k, mass=self._narrowing.mass) if self._narrowing else identity

    @property
    def layer_name(self) -> str | None:
        """NAME-HASH8 of the targets layer."""
        return self._targets.layer.full_name if self._targets else None

    @property
    def hidden_layer(self) -> HiddenIdentity | None:
        """Identity of the hidden layer; None where the cache was opened without one."""
        return self._hidden.layer.identity if self._hidden else None

    @property
    def hidden_name(self) -> str | None:
        """NAME-HASH8 of the hidden layer."""
        return self._hidden.layer.full_name if self._hidden else None

    @property
    def layer_provenance(self) -> dict[str, Any]:
        """What made the layer: versions and machine; empty without one."""
        return dict(self._targets.layer.provenance) if self._targets else {}

    def layers(self) -> dict[str, LayerIdentity]:
        """Return the identity of every targets layer on disk by NAME-HASH8."""
        return {name: layer.identity for name, layer in list_layers(self.path).items()}

    @cached_property
    def cache_id(self) -> str:
        """32 hexadecimal digits that name exactly these rows and targets."""
        digest = xxhash.xxh3_128(read_bounded(self.path / "cache.json", MAX_JSON_BYTES))
        digest.update(b"" if self._targets is None else self._targets.layer.identity.hash8.encode())
        digest.update(b"" if self._narrowing is None else str(self._narrowing).encode())
        for record in (*self._records, *(self._targets.records if self._targets else ())):
            digest.update(f"{record.stem} {record.xxh3}\n".encode())
        if self._hidden is not None:
            digest.update(self._hidden.layer.identity.hash8.encode())
            for record in self._hidden.records:
                digest.update(f"{record.stem} {record.xxh3}\n".encode())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """[R] int32 tokens of each row, from offsets alone."""
        return self._columns[0]

    @property
    def group_keys(self) -> NDArray[np.void]:
        """[R] void16 group key of each row; `.tobytes()` of one is the key."""
        return self._columns[1]

    @cached_property
    def row_keys(self) -> NDArray[np.uint8]:
        """[R, 16] row_key of each row, read from the parts' key columns."""
        keys = [np.zeros((0, 16), np.uint8)]
        columns = part_columns(sequences_dir(self.path), self._records)
        for part, shown in zip(columns, self._shown, strict=True):
            keys.append(part.row_keys if shown is None else part.row_keys[shown])
        return np.ascontiguousarray(np.concatenate(keys))

    def jobs_of_rows(self) -> list[tuple[str, int, int]]:
        """Return (first 8 digits of the job, first row, row after the last) of every part, in order."""
        return [(part.record.id8, part.rows.start, part.rows.stop) for part in self.parts()]

    @property
    def parts_to_come(self) -> int:
        """Return how many parts the cache's jobs planned that are not there: of a build that goes on, or stopped."""
        stems = {record.stem for record in self._records}
        return sum(job.part_stem(unit) not in stems for job in list_jobs(self.path) for unit in range(job.num_units))

    @property
    def sources(self) -> NDArray[np.int32]:
        """[R] int32 index into `source_names` of each row."""
        return self._columns[2]

    @cached_property
    def source_names(self) -> list[str]:
        """Names of the sources, sorted."""
        return sorted({str(name) for record in self._records for name in record.stats.get("sources", {})})

    @cached_property
    def _columns(self) -> tuple[NDArray[np.int32], NDArray[np.void], NDArray[np.int32]]:
        """Gather three values per row over all parts, each part mapped once and none read as a whole."""
        num_tokens = np.empty(len(self), dtype=np.int32)
        group_keys = np.empty(len(self), dtype="V16")
        sources = np.empty(len(self), dtype=np.int32)
        codes = {name: code for code, name in enumerate(self.source_names)}
        start = 0
        columns = part_columns(sequences_dir(self.path), self._records)
        for end, record, shown, part in zip(self._ends, self._records, self._shown, columns, strict=True):
            rows, names = slice(None) if shown is None else shown, part.names.tolist()
            if not codes.keys() >= set(names):
                path = sequences_dir(self.path) / f"{record.stem}.arrow"
                raise DamagedError(f"{path} has a source that its record does not list; it was altered")
            recoded = np.asarray([codes[name] for name in names], dtype=np.int32)[part.codes]
            num_tokens[start:end] = part.num_tokens[rows]
            group_keys[start:end] = np.ascontiguousarray(part.group_keys).view("V16").ravel()[rows]
            sources[start:end] = recoded[rows]
            start = end
        for column in (num_tokens, group_keys, sources):
            column.setflags(write=False)
        return num_tokens, group_keys, sources

    def stats(self) -> dict[str, Any]:
        """Return figures summed from the records: see `shared.cache.reading.cache_stats.summed_stats`."""
        hidden_positions = 0
        for number, record in enumerate(self._records):
            if record.stem in self._masks:
                part, unseen = self._sequences.get(number), (~self._masks[record.stem]).nonzero()[0]
                hidden_positions += sum(part.row(int(i)).num_positions for i in unseen)
        hidden = sum(record.rows for record in self._records) - len(self)
        targets = self._targets.records if self._targets else []
        states = self._hidden.records if self._hidden else None
        return summed_stats(self._records, targets, states, hidden, hidden_positions)

    def _locate(self, index: int) -> tuple[int, int]:
        size = len(self)
        index = int(index)
        if not -size <= index < size:
            raise IndexError(f"row {index} of {size}")
        index %= size
        number = bisect_right(self._ends, index)
        local = index - (self._ends[number - 1] if number else 0)
        shown = self._shown[number]
        return number, local if shown is None else int(shown[local])

    def _open_sequences(self, number: int) -> MappedSequences:
        vocab_size = self.sequences_identity.vocab_size
        part = MappedSequences(sequences_dir(self.path), self._records[number], not self._checked[number], vocab_size)
        self._checked[number] = 1
        return part


def _reopen(
    path: str,
    layer_name: str | None,
    stems: tuple[str, ...],
    cache_id: str,
    narrowing: Narrowing | None,
    hidden_name: str | None,
) -> Cache:
    """Open exactly the parts that a pickled cache had.

    Raises:
        CacheError: they are gone or have changed.
    """
    root = Path(path)
    layer = list_layers(root).get(layer_name) if layer_name else None
    sequences = records_by_stem(sequences_dir(root))
    targets = records_by_stem(layer.directory) if layer else {}
    if any(stem not in sequences or (layer_name and stem not in targets) for stem in stems):
        raise CacheError(f"{path} lost parts while it was in use; restore them and start again")
    records = [sequences[stem] for stem in stems]
    cache = Cache(root, records, layer, targets, False, narrowing, hidden_name or False)
    if cache.cache_id != cache_id:
        raise CacheError(
            f"{path} was altered while it was in use (it is {cache.cache_id} and was {cache_id}); start again"
        )
    return cache


def _can_narrow(found: LayerIdentity, narrowing: Narrowing) -> bool:
    """Tell whether a layer holds the heads that a narrowing keeps."""
    within = narrowing.k <= found.k and narrowing.mass <= found.mass
    return found.mode == "top" and found.label == "apart" and within and narrowing.cut_temperature in found.temperatures

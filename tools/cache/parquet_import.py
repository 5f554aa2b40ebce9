"""`decant cache import`: a cache from Parquet files as `decant cache export` writes them.

Decoded values lie on the codec's grid, so encoding them again gives the codes that they came from: the rows of an
export come back equal bit by bit. Files may have been written by other tools; every row passes the checks of the codec,
its `key` must fit its tokens and `teacher_nll_nats` its labels. All parts get names of one job, as after a merge.
Written beside OUT and renamed. Memory: the encoded rows of a part; a file that would unpack to much more than its bytes
is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict

from shared.cache.layout import sequences_dir, tokenizer_entries
from shared.cache.reading.verify import nll_problem
from shared.cache.tokenizer_files import read_tokenizer_file
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter, part_table
from shared.errors import CacheError, DamagedError, NamingError, first_line
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.keys import KEY_BYTES
from shared.parts.cache_files import open_regular, parse_json, read_bounded, read_json
from shared.parts.headers.parquet_pages import unpacked_bytes
from shared.parts.part_stats import TargetsFigures, targets_stats, targets_stats_problem
from shared.parts.parts import commit_part
from shared.parts.records import checked_model, list_records, read_record
from shared.parts.repeated_rows import repeated_rows
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.codec import Codec
from shared.schema import MAX_FRAME_RATIO, MAX_JSON_BYTES, MAX_ROWS_PER_PART, STEM_PATTERN, TARGETS
from tools.cache.parquet_columns import (
    EXPORT_FORMAT,
    METADATA_FILE,
    PLAIN,
    RECORD_KEY,
    Lists,
    export_schema,
    lists_in,
    read_targets,
)
from tools.cache.staged_directory import DerivedCache

ROWS_PER_BATCH = 64
FREE_BYTES = 2**26
"""What a file may unpack to whatever its size; beyond it, MAX_FRAME_RATIO for each of its bytes."""


@dataclass(frozen=True, slots=True)
class Export:
    """What the metadata file of an export says."""

    identity: SequencesIdentity
    tokenizer_files: Mapping[str, bytes]
    layer_name: str | None
    layer: LayerIdentity | None
    provenance: Mapping[str, Any]


def import_parquet(directory: Path, out: Path, advance: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """Make a cache of Parquet files.

    Args:
        directory: what `decant cache export` wrote.
        out: the new cache; must not exist, or be the same import.
        advance: called with the rows that are done.

    Returns:
        cache, job, rows, parts, layer, existed.

    Raises:
        DamagedError: a file contradicts the format.
        CacheError: `out` is something else, or cannot be written.
    """
    export = _read_export(directory)
    files = sorted(directory.glob("*.parquet"))
    odd = [file for file in files if not STEM_PATTERN.fullmatch(file.stem)]
    if odd:
        raise DamagedError(
            f"{odd[0]} is not named as a part is; expected part-XXXXXXXX-NNNNNN.parquet, hexadecimal digits and a "
            "number"
        )
    digest = xxhash.xxh3_128(read_bounded(directory / METADATA_FILE, MAX_JSON_BYTES))
    for file in files:
        found = file.lstat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    request = {"import": digest.hexdigest()}
    derived = DerivedCache.of(out, "importing", "an import of these files as they are now", request)
    if not derived.existed:
        with derived.written():
            writer = CacheWriter.create_or_open(derived.path, export.identity, export.tokenizer_files)
            target = sequences = sequences_dir(derived.path)
            if export.layer:
                layer = LayerWriter.create_or_open(writer, export.layer_name, export.layer, export.provenance)
                target = layer.directory
            for number, file in enumerate(files):
                stem = derived.stem(number)
                if not (target / f"{stem}.json").exists():
                    _import_file(file, export, writer, target, stem)
                advance(read_record(sequences / f"{stem}.json").rows)
            _refuse_repeats(derived.path, files)
    records = list_records(sequences_dir(out))
    name = f"{export.layer_name}-{export.layer.hash8}" if export.layer else None
    rows = sum(record.rows for record in records)
    cache = {"cache": str(out), "job": derived.job, "rows": rows, "parts": len(records)}
    return {**cache, "layer": name, "existed": derived.existed}


def _read_export(directory: Path) -> Export:
    path = directory / METADATA_FILE
    if not path.is_file():
        raise NamingError(
            f"{directory} has no {METADATA_FILE}, so it is no finished export; write one with 'decant cache export'"
        )
    document = read_json(path)
    if document.get("export_format") != EXPORT_FORMAT:
        raise CacheError(
            f"{path} has export_format {document.get('export_format')!r} and this version reads {EXPORT_FORMAT}"
        )
    identity, described, layer = (document.get(name) for name in ("identity", "tokenizer_files", "layer"))
    if not isinstance(identity, dict) or not isinstance(described, dict) or not isinstance(layer, dict | None):
        raise DamagedError(f"{path} lacks identity, tokenizer_files or layer; it was altered")
    entries = tokenizer_entries(described, path)
    files = {name: read_tokenizer_file(directory, name, entry) for name, entry in entries.items()}
    found = SequencesIdentity.from_json(identity, f"{path}: identity")
    if layer is None:
        return Export(found, files, None, None, {})
    if not all(
        isinstance(layer.get(name), kind) for name, kind in (("name", str), ("identity", dict), ("provenance", dict))
    ):
        raise DamagedError(f"{path} says layer: where name, identity and provenance are expected")
    layer_identity = LayerIdentity.from_json(layer["identity"], f"{path}: layer")
    return Export(found, files, layer["name"], layer_identity, layer["provenance"])


def _import_file(file: Path, export: Export, writer: CacheWriter, target: Path, stem: str) -> None:
    """Commit the rows of one Parquet file."""
    identity = export.layer
    schema = export_schema(identity)
    codec = identity.make_codec() if identity else None
    rows: list[SequenceRow] = []
    scores: list[tuple[float, bytes]] = []
    try:
        with open_regular(file) as source:
            _check_kinds(file, pq.read_schema(source), schema)
        with open_regular(file) as source, pq.ParquetFile(source, read_dictionary=list(PLAIN)) as opened:
            file_bytes = os.fstat(source.fileno()).st_size
            if opened.metadata.num_rows > MAX_ROWS_PER_PART:
                found = opened.metadata.num_rows
                raise DamagedError(f"{file} has {found} rows where a part has at most {MAX_ROWS_PER_PART}")
            check_unpacked(file, source, opened)
            about = _about(file, opened.schema_arrow.metadata)
            for table in _plain_batches(opened, schema, _most_bytes(file_bytes)):
                _read_batch(file, table, codec, rows, scores)
        writer.write_sequences(stem, rows, about.get("software", {}), about.get("set_aside", ()))
    except (pa.ArrowException, ValueError, TypeError, IndexError, OverflowError, OSError, MemoryError) as error:
        raise DamagedError(f"{file} cannot be imported: {first_line(error)}") from None
    if codec is not None:
        _write_targets(file, target, stem, rows, scores, codec, about)


class _About(BaseModel):
    """What an export notes about a part."""

    model_config = ConfigDict(strict=True, extra="ignore")

    software: dict[str, Any] = {}
    set_aside: list[dict[str, Any]] = []
    targets_software: dict[str, Any] = {}
    targets_stats: TargetsFigures | None = None
    blobs_xxh3: str = ""


def _about(file: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return what the export noted about a part; nothing where another tool wrote the file."""
    text = (metadata or {}).get(RECORD_KEY)
    if text is None:
        return {}
    about = parse_json(text, f"{file}: note {RECORD_KEY.decode()}")
    checked_model(_About, about, f"{file}: note {RECORD_KEY.decode()}")
    return about


def check_unpacked(file: Path, source: BinaryIO, opened: pq.ParquetFile) -> int:
    """Return the bytes that a file says it unpacks to, page by page; `source` is the file that is `opened`.

    Raises:
        DamagedError: they are out of proportion to its own.
        ValueError: a page contradicts the format.
    """
    file_bytes = os.fstat(source.fileno()).st_size
    unpacked = unpacked_bytes(source, opened.metadata)
    if unpacked > _most_bytes(file_bytes):
        raise DamagedError(f"{file} claims {unpacked:,} bytes in {file_bytes:,}; it was altered")
    return unpacked


def _check_kinds(file: Path, found: pa.Schema, wanted: pa.Schema) -> None:
    """Refuse a column of another kind by its type, before it is read: nothing is made a number or a text of."""
    for field in wanted:
        if found.names.count(field.name) != 1:
            number = "more than one" if field.name in found.names else "no"
            raise DamagedError(
                f"{file} has {number} column {field.name}; expected those of 'decant cache export' for this layer"
            )
        kind = found.field(field.name).type
        (depth, values), (wanted_depth, wanted_values) = lists_in(kind), lists_in(field.type)
        inner = values.value_type if pa.types.is_dictionary(values) and not depth else values  # as pandas writes some
        if depth != wanted_depth or not any(like(inner) and like(wanted_values) for like in _ALIKE):
            raise DamagedError(f"{file} has a column {field.name} of {str(kind)[:80]}; expected {field.type}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_key(kind: pa.DataType) -> bool:
    """Tell whether values are bytes of a key's length, or of any as other tools write them."""
    return bool(kind in (pa.binary(), pa.large_binary()) or kind == pa.binary(KEY_BYTES))


_ALIKE = (_is_text, _is_key, pa.types.is_integer, pa.types.is_floating)
"""Types that are the same for a reader, however wide they were written."""


def _most_bytes(file_bytes: int) -> int:
    return FREE_BYTES + MAX_FRAME_RATIO * file_bytes


def _plain_batches(opened: pq.ParquetFile, schema: pa.Schema, room: int) -> Iterator[pa.Table]:
    """Yield a few rows at a time; texts stay dictionaries until their size is known.

    Raises:
        ValueError: texts of more than `room` bytes.
    """
    for batch in opened.iter_batches(ROWS_PER_BATCH, columns=schema.names):
        for name in PLAIN:
            room -= _text_bytes(batch.column(name))
        if room < 0:
            raise ValueError("its texts unpack to more than a file of its size may hold")
        whole = {name: _decoded(batch.column(name)) for name in schema.names}
        yield pa.table(whole).cast(schema).combine_chunks()


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _text_bytes(column: pa.Array) -> int:
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)


def _read_batch(
    file: Path, table: pa.Table, codec: Codec | None, rows: list[SequenceRow], scores: list[tuple[float, bytes]]
) -> None:
    """Append rows and encoded targets of a batch."""
    plain = {name: table.column(name).to_pylist() for name in PLAIN}
    lists = {
        field.name: Lists(table.column(field.name).chunk(0))
        for field in table.schema
        if pa.types.is_list(field.type) and table.num_rows
    }
    nll, num_positions = (table.column(n).to_pylist() if codec else [] for n in ("teacher_nll_nats", "num_positions"))
    for i in range(table.num_rows):
        where = f"{file}:{len(rows)}"
        values = {name: plain[name][i] for name in PLAIN if name != "key"}
        if any(value is None for name, value in values.items() if name != "reference"):
            raise DamagedError(f"{where} has a null; only reference may be null")
        try:
            spans = list(
                zip(lists["span_starts"].values(i).tolist(), lists["span_ends"].values(i).tolist(), strict=True)
            )
            row = make_row(**values, token_ids=lists["token_ids"].values(i), spans=spans)
            if row.key != plain["key"][i]:
                raise ValueError("its tokens or spans do not fit its key, so its targets belong to another content")
            rows.append(row)
            if codec is not None:
                targets = read_targets(lists, i, codec.temperatures, draws=bool(codec.draws))
                if targets.num_positions != row.num_positions:
                    raise ValueError(
                        f"it has targets of {targets.num_positions} positions and supervises {row.num_positions}"
                    )
                if num_positions[i] != row.num_positions:
                    raise ValueError(f"num_positions is {num_positions[i]} and it supervises {row.num_positions}")
                if nll[i] is None:
                    raise ValueError("teacher_nll_nats is null")
                blob = codec.encode(targets)
                problem = nll_problem(nll[i], codec.decode(blob, row.num_positions))
                if problem:
                    raise ValueError(problem)
                scores.append((nll[i], blob))
        except ValueError as error:
            raise DamagedError(f"{where} cannot be imported: {error}") from None


def _write_targets(
    file: Path,
    directory: Path,
    stem: str,
    rows: list[SequenceRow],
    scores: list[tuple[float, bytes]],
    codec: Codec,
    about: dict[str, Any],
) -> None:
    digest = xxhash.xxh3_128()
    for row, (_, blob) in zip(rows, scores, strict=True):
        digest.update(row.key)
        digest.update(blob)
    decoded = (codec.decode(blob, row.num_positions) for row, (_, blob) in zip(rows, scores, strict=True))
    stats = targets_stats(decoded, sum(len(blob) for _, blob in scores))
    said = about.get("targets_stats")
    if said is not None and digest.hexdigest() == about.get("blobs_xxh3"):  # else altered, or by another zstandard
        problem = targets_stats_problem(said, stats, codec.gap_step)
        if problem:
            raise DamagedError(f"{file}: the note of the export says {problem}; export the cache again")
        stats = said
    nll, blobs = zip(*scores, strict=True) if scores else ((), ())
    table = part_table(TARGETS, [row.key for row in rows], [row.num_positions for row in rows], nll, blobs)
    commit_part(directory, stem, table, stats, about.get("targets_software", {}), ())


def _refuse_repeats(staging: Path, files: list[Path]) -> None:
    """Refuse rows that are there twice."""
    repeats = repeated_rows([(sequences_dir(staging), record) for record in list_records(sequences_dir(staging))])
    for number, mask in repeats.items():
        raise DamagedError(
            f"{files[number]}:{int(mask.argmax())} has the row_key of an earlier row; every row is wanted once, "
            f"so leave one out and delete {staging}"
        )


def import_text(result: dict[str, Any]) -> str:
    """Say for people what an import made."""
    layer = f"targets {result['layer']}" if result["layer"] else "no targets"
    there = "; it was there already" if result["existed"] else ""
    return f"{result['cache']}: {result['rows']:,} rows in {result['parts']:,} parts, {layer}{there}"

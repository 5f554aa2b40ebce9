"""`decant cache import`: a cache from Parquet files as `decant cache export` writes them.

Decoded values lie on the codec's grid, so encoding them again gives the codes that they came from: the rows of an
export come back equal bit by bit. Files may have been written by other tools; every row passes the checks of the codec,
and its `key` must fit its
tokens. All parts get names of one job, as after a merge. Written beside OUT and renamed. Memory: the encoded rows of a
part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shared.cache.cache_writer import CacheWriter
from shared.cache.layout import sequences_dir, tokenizer_path
from shared.errors import CacheError, DamagedError, first_line
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.parts.jobs import create_job, job_id
from shared.parts.part_stats import targets_stats
from shared.parts.parts import commit_part, hash_file
from shared.parts.records import list_records, read_json
from shared.parts.repeated_rows import repeated_rows
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.codec import Codec
from shared.schema import MAX_ROWS_PER_PART, MAX_TOKENIZER_FILE_BYTES, STEM_PATTERN, TARGETS
from tools.cache.parquet_columns import (
    EXPORT_FORMAT,
    METADATA_FILE,
    PLAIN,
    RECORD_KEY,
    Lists,
    export_schema,
    read_targets,
)
from tools.cache.staged_directory import publish, refuse_existing, staging_path

ROWS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class Export:
    """What the metadata file of an export says."""

    directory: Path
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
    digest = xxhash.xxh3_128((directory / METADATA_FILE).read_bytes())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    request = {"import": digest.hexdigest()}
    job = job_id(request)
    existed = (out / "cache.json").is_file() and (out / "jobs" / job / "plan.arrow").is_file()
    if not existed:
        refuse_existing(out, "an import of these files as they are now")
        staging = staging_path(out, "importing", job)
        writer = CacheWriter.create_or_open(staging, export.identity, export.tokenizer_files)
        layer = writer.layer(export.layer_name, export.layer, export.provenance) if export.layer else None
        create_job(staging, request, (), 1)
        for number, file in enumerate(files):
            stem = f"part-{job[:8]}-{number:06d}"
            target = layer.directory if layer else sequences_dir(staging)
            if not (target / f"{stem}.json").exists():
                _import_file(file, export, writer, target, stem)
            advance(pq.read_metadata(file).num_rows)
        _refuse_repeats(staging, files)
        publish(staging, out, out / "jobs" / job / "plan.arrow")
    records = list_records(sequences_dir(out))
    name = f"{export.layer_name}-{export.layer.hash8}" if export.layer else None
    rows = sum(record.rows for record in records)
    return {"cache": str(out), "job": job, "rows": rows, "parts": len(records), "layer": name, "existed": existed}


def _read_export(directory: Path) -> Export:
    path = directory / METADATA_FILE
    if not path.is_file():
        raise CacheError(
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
    files = {}
    for name, entry in described.items():
        file = tokenizer_path(directory, name)
        if (
            not file.is_file()
            or file.stat().st_size > MAX_TOKENIZER_FILE_BYTES
            or hash_file(file)[0] != entry.get("xxh3")
        ):
            raise DamagedError(f"{file} is not what {METADATA_FILE} says; restore it from the export")
        files[name] = file.read_bytes()
    found = SequencesIdentity.from_json(identity, f"{path}: identity")
    if layer is None:
        return Export(directory, found, files, None, None, {})
    if not all(
        isinstance(layer.get(name), kind) for name, kind in (("name", str), ("identity", dict), ("provenance", dict))
    ):
        raise DamagedError(f"{path} says layer: where name, identity and provenance are expected")
    return Export(
        directory,
        found,
        files,
        layer["name"],
        LayerIdentity.from_json(layer["identity"], f"{path}: layer"),
        layer["provenance"],
    )


def _import_file(file: Path, export: Export, writer: CacheWriter, target: Path, stem: str) -> None:
    """Commit the rows of one Parquet file."""
    identity = export.layer
    schema = export_schema(
        identity.temperatures if identity else (), targets=identity is not None, draws=bool(identity and identity.draws)
    )
    codec = identity.make_codec() if identity else None
    rows: list[SequenceRow] = []
    scores: list[tuple[float, bytes]] = []
    try:
        with pq.ParquetFile(file) as opened:
            about = _about(opened.schema_arrow.metadata)
            if opened.metadata.num_rows > MAX_ROWS_PER_PART:
                raise DamagedError(
                    f"{file} has {opened.metadata.num_rows} rows where a part has at most {MAX_ROWS_PER_PART}"
                )
            missing = sorted(set(schema.names) - set(opened.schema_arrow.names))
            if missing:
                raise DamagedError(
                    f"{file} has no column {missing[0]}; expected those of 'decant cache export' for this layer"
                )
            for batch in opened.iter_batches(ROWS_PER_BATCH, columns=schema.names):
                table = pa.Table.from_batches([batch]).select(schema.names).cast(schema).combine_chunks()
                _read_batch(file, table, codec, rows, scores)
        writer.write_sequences(stem, rows, about.get("software", {}), about.get("set_aside", ()))
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise DamagedError(f"{file} cannot be imported: {first_line(error)}") from None
    if codec is not None:
        _write_targets(target, stem, rows, scores, codec, about)


def _about(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return what the export noted about a part; nothing where another tool wrote the file."""
    try:
        about = json.loads((metadata or {})[RECORD_KEY].decode("utf-8", "surrogatepass"))
    except (KeyError, ValueError):
        return {}
    kinds = {"software": dict, "set_aside": list, "targets_software": dict, "targets_stats": dict, "blobs_xxh3": str}
    return {
        name: about[name]
        for name, kind in kinds.items()
        if isinstance(about, dict) and isinstance(about.get(name), kind)
    }


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
    nll = table.column("teacher_nll_nats").to_pylist() if codec else []
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
                scores.append((nll[i], codec.encode(targets)))
        except ValueError as error:
            raise DamagedError(f"{where} cannot be imported: {error}") from None


def _write_targets(
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
    stats = about.get("targets_stats", {})
    if digest.hexdigest() != about.get("blobs_xxh3"):  # altered, or compressed by another zstandard: count anew
        decoded = (codec.decode(blob, row.num_positions) for row, (_, blob) in zip(rows, scores, strict=True))
        stats = targets_stats(decoded, sum(len(blob) for _, blob in scores))
    columns = {
        "key": [row.key for row in rows],
        "num_positions": [row.num_positions for row in rows],
        "teacher_nll_nats": [nll for nll, _ in scores],
        "blob": [blob for _, blob in scores],
    }
    table = pa.Table.from_arrays([pa.array(columns[f.name], type=f.type) for f in TARGETS], schema=TARGETS)
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

"""`decant cache export`: a cache as plain Parquet, one file per part, with its identity in a JSON file beside them.

Written beside OUT_DIR and renamed, so a killed export is continued by the same command. Memory: a batch of rows. Cost:
some 0.13 million positions of 64 entries per second and core (reading them back 0.23 million).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shared.atomic import Fill, fill_exclusive, make_dir, write_atomic
from shared.cache.cache import Cache, ReadPart
from shared.cache.layout import (
    Layer,
    choose_layer,
    list_hidden_layers,
    list_layers,
    read_header,
    sequences_dir,
    tokenizer_path,
)
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import CacheError, first_line
from shared.parts.cache_files import read_json
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.records import json_bytes
from shared.schema import SEQUENCES
from tools.cache.parquet_columns import (
    EXPORT_FORMAT,
    METADATA_FILE,
    PLAIN,
    RECORD_KEY,
    export_schema,
    flat,
    targets_columns,
)
from tools.cache.staged_directory import refuse_existing, staged

MOST_POSITIONS_PER_BATCH = 2**15
MOST_ROWS_PER_BATCH = 256


def export_cache(
    path: Path, out: Path, targets: str | None = None, advance: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Write a cache as Parquet.

    Args:
        path: the cache.
        out: the new directory; must not exist, or be the same export.
        targets: layer; None for the only one, or none where there is none.
        advance: called with the rows that are done.

    Returns:
        directory, files, rows, layer, bytes, existed, hidden_left_out (hidden layers, which are not exported).

    Raises:
        CacheError: rows are not scored, something is damaged, or `out` is something else.
    """
    cache = Cache.open(path, targets)  # whose parts are exported, also when the cache grows meanwhile
    cache_id = cache.cache_id
    metadata = out / METADATA_FILE
    existed = metadata.is_file() and read_json(metadata).get("cache_id") == cache_id
    layer = choose_layer(list_layers(path), cache.layer_name, path) if cache.layer_name else None
    if not existed:
        refuse_existing(out, "an export of this cache as it is now")
        tokenizer = read_tokenizer_files(path)  # a damaged one is refused before any work
        with staged(out, "exporting", cache_id, metadata) as staging:
            for part in cache.parts():
                file = staging / f"{part.record.stem}.parquet"
                if not file.exists():
                    _write_part(cache, layer, part, file)
                advance(part.record.rows)
            _write_metadata(path, layer, staging, cache_id, tokenizer)
    return exported(cache, out, existed=existed)


def exported(cache: Cache, out: Path, *, existed: bool) -> dict[str, Any]:
    """Return directory, files, rows, layer, bytes, existed and hidden_left_out of an export."""
    sizes = [file.stat().st_size for file in out.glob("*.parquet")]
    return {
        "directory": str(out),
        "files": len(sizes),
        "rows": len(cache),
        "layer": cache.layer_name,
        "bytes": sum(sizes),
        "existed": existed,
        "hidden_left_out": sorted(list_hidden_layers(cache.path)),
    }


def write_parquet(file: Path, fill: Fill, expected_bytes: int) -> None:
    """Write a Parquet file, whole or not at all; `expected_bytes` only serves the message of a full disk.

    Raises:
        CacheError: it cannot be written.
    """
    try:
        fill_exclusive(file, fill, "sequences", expected_bytes)
    except pa.ArrowException as error:
        raise CacheError(f"{file} cannot be written: {first_line(error)}") from None


def _write_metadata(
    path: Path, layer: Layer | None, staging: Path, cache_id: str, tokenizer: Mapping[str, bytes]
) -> None:
    header = read_header(path)
    for name, data in tokenizer.items():
        target = tokenizer_path(staging, name)
        make_dir(target.parent)
        write_atomic(target, data, "tokenizer")
    described = None
    if layer is not None:
        described = {
            "name": layer.short_name,
            "identity": layer.identity.to_json(),
            "provenance": dict(layer.provenance),
        }
    document = {
        "export_format": EXPORT_FORMAT,
        "cache_id": cache_id,
        "identity": header.identity.to_json(),
        "tokenizer_files": header.tokenizer_files,
        "layer": described,
    }
    write_atomic(staging / METADATA_FILE, json_bytes(document), "cache_json")


def _write_part(cache: Cache, layer: Layer | None, read: ReadPart, file: Path) -> None:
    """Write the shown rows of one part."""
    record, scores, shown = read.record, read.targets, read.shown
    vocab_size = cache.sequences_identity.vocab_size
    part = MappedSequences(sequences_dir(cache.path), record, verify=True, vocab_size=vocab_size)
    scored = None
    about: dict[str, Any] = {"software": record.software, "set_aside": record.set_aside}
    if layer is not None and scores is not None:
        scored = MappedBlobs(layer.directory, scores, verify=True)
        about |= {"targets_software": scores.software, "targets_stats": scores.stats}
        about["blobs_xxh3"] = _blobs_digest(part, scored) if shown is None else ""
    text = json.dumps(about, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    schema = export_schema(layer.identity if layer else None).with_metadata({RECORD_KEY: text})
    chosen = np.arange(len(part)) if shown is None else np.flatnonzero(shown)

    def fill(target: BinaryIO) -> None:
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for columns in _batches(part, scored, layer, chosen.tolist()):
                writer.write_table(pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema))

    write_parquet(file, fill, record.bytes)


def _blobs_digest(part: MappedSequences, scored: MappedBlobs) -> str:
    """Return 32 hexadecimal digits of a part's keys and blobs, by which an import knows altered targets."""
    digest = xxhash.xxh3_128()
    for i in range(len(part)):
        digest.update(part.keys[i].tobytes())
        digest.update(scored.blob(i, part.row(i)))
    return digest.hexdigest()


def _batches(
    part: MappedSequences, scored: MappedBlobs | None, layer: Layer | None, chosen: list[int]
) -> Iterator[dict[str, pa.Array]]:
    """Yield columns of a few rows at a time."""
    codec = layer.identity.make_codec() if layer else None
    start = 0
    while start < len(chosen):
        rows, positions = [], 0
        for i in chosen[start : start + MOST_ROWS_PER_BATCH]:
            rows.append(part.row(i))
            positions += rows[-1].num_positions
            if positions >= MOST_POSITIONS_PER_BATCH:
                break
        taken = chosen[start : start + len(rows)]
        start += len(rows)
        columns = {
            name: pa.array([getattr(row, name) for row in rows], type=SEQUENCES.field(name).type) for name in PLAIN
        }
        ints = pa.list_(pa.int32())
        columns["token_ids"] = flat([row.token_ids for row in rows], ints)
        columns["span_starts"] = flat([row.spans[:, 0] for row in rows], ints)
        columns["span_ends"] = flat([row.spans[:, 1] for row in rows], ints)
        if codec is not None and scored is not None:
            decoded = [scored.content(i, row, codec.decode) for i, row in zip(taken, rows, strict=True)]
            columns |= targets_columns(decoded)
            columns["teacher_nll_nats"] = pa.array([float(scored.teacher_nll_nats[i]) for i in taken], pa.float64())
        yield columns


def export_text(result: dict[str, Any]) -> str:
    """Say for people what an export wrote."""
    layer = f"targets {result['layer']}" if result["layer"] else "no targets"
    there = "; it was there already" if result["existed"] else ""
    hidden = ", ".join(result["hidden_left_out"])
    left_out = f"; hidden layers are not exported: {hidden} left out" if hidden else ""
    return (
        f"{result['directory']}: {result['rows']:,} rows in {result['files']:,} Parquet files, {layer}{there}{left_out}"
    )

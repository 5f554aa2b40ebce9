"""One committed part: an Arrow IPC file and its commit record. A part without a record does not exist.

Commit: the Arrow file, which carries the content of its record in its schema's metadata, is created by exclusive
link, so it never changes afterwards; the record, which adds size and checksum, is a pure function of that file. So a
crash between the two loses nothing (the next writer of the same unit adopts the file), and two writers of one unit
cannot leave a record that does not fit its file, whatever their order.

Cleaning up (shared/cache/writing/garbage.py) may take away a file whose record is not there yet, so a writer looks for
its file once the record is there, and begins again where it is gone.

Cost: writing streams through the checksum once; listing reads one small JSON per part; opening maps the file and
reads only its footer and one header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from shared.atomic import fill_exclusive, write_atomic
from shared.errors import CacheError, DamagedError, first_line
from shared.parts.cache_files import arrow_name, hash_file, open_regular, parse_json
from shared.parts.headers.arrow_layout import ArrowLayout
from shared.parts.part_file import with_part_file
from shared.parts.records import PartRecord, check_layer, kind_of, layer_of, read_record, sealed_json
from shared.places import origin_of
from shared.schema import FORMAT_VERSION, HIDDEN, MAX_JSON_BYTES, MAX_ROWS_PER_PART, SEQUENCES, STEM_PATTERN, TARGETS

_METADATA_KEY = b"decant"
_LAYER_KEY = b"layer"
_MOST_ATTEMPTS = 5


class _HashingFile:
    """A writable file that hashes and counts what passes through."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.num_bytes += view.nbytes
        return self._file.write(view)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Leave the file open: its owner still has to fsync it."""


def commit_part(
    directory: Path,
    stem: str,
    table: pa.Table,
    stats: Mapping[str, Any],
    software: Mapping[str, Any],
    set_aside: Sequence[Mapping[str, Any]],
) -> PartRecord:
    """Write a part and its record; a part that is committed already is left as it is.

    Args:
        directory: `sequences/` or a layer; its name decides the fail-points.
        stem: file name without its ending.
        table: rows of the SEQUENCES, TARGETS or HIDDEN schema; `stats` must name their `positions`.
        stats: figures of the rows; `positions` is required.
        software: versions of what made them.
        set_aside: rows of the unit that were left out, each with a `reason`.

    Returns:
        The record on disk, which is another writer's where that one came first.

    Raises:
        CacheError: the disk is full or the directory cannot be written.
        ValueError: a name or table that contradicts the format.
    """
    if not STEM_PATTERN.fullmatch(stem):
        raise ValueError(f"{stem!r} is not the name of a part")
    if not table.schema.equals(_schema_of(directory)) or table.num_rows > MAX_ROWS_PER_PART:
        raise ValueError(
            f"the table does not fit the schema of {kind_of(directory)} or has more than {MAX_ROWS_PER_PART} rows"
        )
    record_path = directory / f"{stem}.json"
    content = {
        "rows": table.num_rows,
        "positions": int(stats["positions"]),
        "stats": dict(stats),
        "software": dict(software),
        "set_aside": [dict(item) for item in set_aside],
    }
    for _ in range(_MOST_ATTEMPTS):
        if not record_path.exists():
            _write_part(directory, stem, table, content)
        if record_path.with_suffix(".arrow").exists():
            return read_record(record_path)
        record_path.unlink(missing_ok=True)  # the part was cleaned up as an orphan while its writer was asleep
    raise CacheError(
        f"{record_path.with_suffix('.arrow')} is removed as soon as it is written; run one clean-up at a time"
    )


def _write_part(directory: Path, stem: str, table: pa.Table, content: Mapping[str, Any]) -> None:
    """Write or adopt the Arrow file, then its record."""
    what, path = kind_of(directory), directory / f"{stem}.arrow"
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    metadata = {_METADATA_KEY: text.encode("utf-8", "surrogatepass")}
    layer = layer_of(directory)
    if layer is not None:
        metadata[_LAYER_KEY] = layer.encode()
    schema = table.schema.with_metadata(metadata)
    hashed: list[_HashingFile] = []

    def fill(file: BinaryIO) -> None:
        hashing = _HashingFile(file)
        hashed.append(hashing)
        with pa.ipc.new_file(pa.PythonFile(hashing, mode="w"), schema) as writer:
            if table.num_rows:
                writer.write_batch(table.combine_chunks().to_batches()[0].replace_schema_metadata(schema.metadata))

    if fill_exclusive(path, fill, what, table.nbytes):
        xxh3, num_bytes = hashed[0].digest.hexdigest(), hashed[0].num_bytes
    else:  # a writer that was killed before its record, or one that is about to write the same record
        content, layer, xxh3, num_bytes = _adopt(path)
    document = {"format": FORMAT_VERSION, "stem": stem, "bytes": num_bytes, "xxh3": xxh3, **content}
    if layer is not None:
        document["layer"] = layer
    write_atomic(directory / f"{stem}.json", sealed_json(document), f"{what}_record")


def _adopt(path: Path) -> tuple[dict[str, Any], str | None, str, int]:
    """Return record content, layer, checksum and size of a part whose writer did not finish its record."""
    metadata = map_table(path, _schema_of(path.parent)).schema.metadata or {}
    if _METADATA_KEY not in metadata:
        raise DamagedError(f"{path} is not a part of a cache; move it away and run the same command again")
    xxh3, num_bytes = hash_file(path)
    return parse_json(metadata[_METADATA_KEY], path), _layer_said(metadata), xxh3, num_bytes


def _layer_said(metadata: Mapping[bytes, bytes]) -> str | None:
    return metadata[_LAYER_KEY].decode("ascii", "replace") if _LAYER_KEY in metadata else None


def check_file(directory: Path, record: PartRecord) -> None:
    """Compare a part's size and checksum with its record.

    Raises:
        DamagedError: they differ.
    """
    path = directory / f"{record.stem}.arrow"
    xxh3, num_bytes = with_part_file(directory, record, hash_file)
    if (xxh3, num_bytes) != (record.xxh3, record.bytes):
        raise DamagedError(
            f"{path} has {num_bytes} bytes with checksum {xxh3} where its record says {record.bytes} bytes with "
            f"{record.xxh3}; it was truncated or altered after it was committed: restore it, or delete it with its "
            "record and build again"
        )


def map_table(path: Path, schema: pa.Schema, directory: Path | None = None) -> pa.Table:
    """Map an Arrow file of a part into memory, that of `directory` where it lies elsewhere; only metadata is read.

    Raises:
        DamagedError: it cannot be read, is no regular file, is not an Arrow file of these columns, has more than one
            batch, is compressed inside, has nulls where the format has none, or is of another layer.
    """
    try:
        with open_regular(path) as file, pa.memory_map(arrow_name(path)) as source:
            if source.size() != os.fstat(file.fileno()).st_size:
                raise DamagedError(f"{path} changed while it was opened; open it again once nothing writes it")
            buffer = source.read_buffer()
        layout = ArrowLayout(memoryview(buffer))
        if len(layout.blocks) > 1:
            raise DamagedError(f"it has {len(layout.blocks)} record batches where a part has at most one")
        for number in range(len(layout.blocks)):
            layout.check_batch(number, schema)
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        if not reader.schema.equals(schema):
            raise DamagedError(f"it has not the columns {', '.join(schema.names)}; it is another file or was altered")
        table = reader.read_all()
        table.validate()
        low, high = buffer.address, buffer.address + buffer.size
        inside = all(_lies_within(chunk, low, high) for column in table.columns for chunk in column.chunks)
    except DamagedError as error:
        raise error if str(error).startswith(str(path)) else DamagedError(f"{path} is damaged: {error}") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedError(f"{path} is not a readable Arrow file ({first_line(error)})") from None
    if not inside:
        raise DamagedError(f"{path} is compressed inside where a part is stored plain")
    check_layer(_layer_said(table.schema.metadata or {}), path if directory is None else directory / path.name)
    return table


def _lies_within(array: pa.Array, low: int, high: int) -> bool:
    """Tell whether every buffer of an array lies in the mapped file, so that nothing was decompressed or copied."""
    buffers = [buffer for buffer in array.buffers() if buffer is not None and buffer.size]
    return all(low <= buffer.address and buffer.address + buffer.size <= high for buffer in buffers)


def open_part(directory: Path, record: PartRecord, verify: bool) -> pa.Table:
    """Map a committed part of `sequences/` or of a layer into memory; with `verify`, compare the whole file with the
    record's checksum first, and the record with what the file repeats.

    Raises:
        DamagedError: it is not what was committed.
    """
    if verify:
        check_file(directory, record)
    path = directory / f"{record.stem}.arrow"
    table = with_part_file(directory, record, lambda file: map_table(file, _schema_of(directory), directory))
    if table.num_rows != record.rows:
        raise DamagedError(
            f"{path} has {table.num_rows} rows where its record says {record.rows}; it is another part or was altered"
        )
    check_whole(path, record.bytes)
    if verify:
        _check_content(path, table.schema.metadata or {}, record)
    return table


def check_whole(path: Path, num_bytes: int) -> None:
    """Refuse a mapped part that was cut or replaced since: touching a page beyond its end would kill the process.

    A part that was fetched is a file of this machine's own, whose name may go while it is mapped; nothing cuts it.

    Raises:
        DamagedError: its size is not `num_bytes`.
    """
    if origin_of(path) is not None:
        return
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path} is gone while it is in use: {error.strerror}; restore it and start again") from None
    if found != num_bytes:
        raise DamagedError(
            f"{path} has {found:,} bytes where its record says {num_bytes:,}; it was cut or altered after it was "
            "committed: restore it from a copy"
        )


def _check_content(path: Path, metadata: Mapping[bytes, bytes], record: PartRecord) -> None:
    text = metadata.get(_METADATA_KEY, b"")
    if len(text) > MAX_JSON_BYTES:
        raise DamagedError(
            f"{path} repeats {len(text):,} bytes of its record where at most {MAX_JSON_BYTES:,} are expected"
        )
    if parse_json(text, path) != record.content() or record.layer not in (None, _layer_said(metadata)):
        raise DamagedError(
            f"{path.with_suffix('.json')} says something else than the part it describes; restore it from a copy"
        )


def _schema_of(directory: Path) -> pa.Schema:
    return {"sequences": SEQUENCES, "targets": TARGETS, "hidden": HIDDEN}[kind_of(directory)]

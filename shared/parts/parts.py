"""One committed part: an Arrow IPC file and its commit record. A part without a record does not exist.

Commit: the Arrow file, which carries the content of its record in its schema's metadata, is created by exclusive link,
    so it
never changes afterwards; the record, which adds size and checksum, is a pure function of that file. So a crash between
the two loses nothing (the next writer of the same unit adopts the file), and two writers of one unit cannot leave a
record that does not fit its file, whatever their order.

Cost: writing streams through the checksum once; listing reads one small JSON per part; opening maps the file and reads
    only
its footer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from shared.atomic import fill_exclusive, write_atomic
from shared.errors import DamagedError, first_line
from shared.parts.records import PartRecord, json_bytes, list_records, read_record
from shared.schema import FORMAT_VERSION, HIDDEN, MAX_ROWS_PER_PART, SEQUENCES, STEM_PATTERN, TARGETS

__all__ = ["PartRecord", "check_file", "commit_part", "hash_file", "list_records", "map_table", "open_part"]

_METADATA_KEY = b"decant"
_READ_BYTES = 2**20


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
    what = kind_of(directory)
    if not STEM_PATTERN.fullmatch(stem):
        raise ValueError(f"{stem!r} is not the name of a part")
    if not table.schema.equals(_schema_of(directory)) or table.num_rows > MAX_ROWS_PER_PART:
        raise ValueError(f"the table does not fit the schema of {what} or has more than {MAX_ROWS_PER_PART} rows")
    record_path = directory / f"{stem}.json"
    if record_path.exists():
        return read_record(record_path)
    content = {
        "rows": table.num_rows,
        "positions": int(stats["positions"]),
        "stats": dict(stats),
        "software": dict(software),
        "set_aside": [dict(item) for item in set_aside],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    schema = table.schema.with_metadata({_METADATA_KEY: text.encode("utf-8", "surrogatepass")})
    path = directory / f"{stem}.arrow"
    hashed: list[_HashingFile] = []

    def fill(file: BinaryIO) -> None:
        hashing = _HashingFile(file)
        hashed.append(hashing)
        with pa.ipc.new_file(pa.PythonFile(hashing, mode="w"), schema) as writer:
            if table.num_rows:
                writer.write_batch(table.combine_chunks().to_batches()[0].replace_schema_metadata(schema.metadata))

    if fill_exclusive(path, fill, what, table.nbytes, step="rename"):
        xxh3, num_bytes = hashed[0].digest.hexdigest(), hashed[0].num_bytes
    else:  # a writer that was killed before its record, or one that is about to write the same record
        content, xxh3, num_bytes = _adopt(path)
    document = {"format": FORMAT_VERSION, "stem": stem, "bytes": num_bytes, "xxh3": xxh3, **content}
    write_atomic(record_path, json_bytes(document), f"{what}_record")
    return read_record(record_path)


def _adopt(path: Path) -> tuple[dict[str, Any], str, int]:
    """Return record content, checksum and size of a part that another writer created without finishing its record."""
    metadata = map_table(path, _schema_of(path.parent)).schema.metadata or {}
    if _METADATA_KEY not in metadata:
        raise DamagedError(f"{path} is not a part of a cache; move it away and run the same command again")
    xxh3, num_bytes = hash_file(path)
    return json.loads(metadata[_METADATA_KEY].decode("utf-8", "surrogatepass")), xxh3, num_bytes


def hash_file(path: Path) -> tuple[str, int]:
    """Return xxh3-128 in hexadecimal and the size in bytes of a file, read in pieces.

    Raises:
        DamagedError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    num_bytes = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                num_bytes += len(piece)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest(), num_bytes


def check_file(directory: Path, record: PartRecord) -> None:
    """Compare a part's size and checksum with its record.

    Raises:
        DamagedError: they differ.
    """
    path = directory / f"{record.stem}.arrow"
    xxh3, num_bytes = hash_file(path)
    if (xxh3, num_bytes) != (record.xxh3, record.bytes):
        raise DamagedError(
            f"{path} has {num_bytes} bytes with checksum {xxh3} where its record says {record.bytes} bytes with "
            f"{record.xxh3}; "
            "it was truncated or altered after it was committed: restore it, or delete it with its record and build "
            "again"
        )


def map_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Map an Arrow file into memory; nothing but its metadata is read.

    Raises:
        DamagedError: it cannot be read, is not an Arrow file of these columns, has more than one batch, or is
            compressed inside.
    """
    try:
        with pa.memory_map(str(path)) as source:
            low = source.read_buffer(1).address
            high = low + source.size()
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(schema):
                raise DamagedError(
                    f"{path} has not the columns {', '.join(schema.names)}; it is another file or was altered"
                )
            if reader.num_record_batches > 1:
                raise DamagedError(
                    f"{path} has {reader.num_record_batches} record batches where a part has at most one"
                )
            table = reader.read_all()
        table.validate()
        inside = all(_lies_within(chunk, low, high) for column in table.columns for chunk in column.chunks)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedError(f"{path} is not a readable Arrow file ({first_line(error)})") from None
    if not inside:
        raise DamagedError(f"{path} is compressed inside where a part is stored plain")
    return table


def _lies_within(array: pa.Array, low: int, high: int) -> bool:
    """Tell whether every buffer of an array lies in the mapped file, so that nothing was decompressed or copied."""
    buffers = [buffer for buffer in array.buffers() if buffer is not None and buffer.size]
    return all(low <= buffer.address and buffer.address + buffer.size <= high for buffer in buffers)


def open_part(directory: Path, record: PartRecord, verify: bool) -> pa.Table:
    """Map a committed part into memory.

    Args:
        directory: `sequences/` or a layer.
        record: the part's commit record.
        verify: compare the whole file with the record's checksum first.

    Raises:
        DamagedError: it is not what was committed.
    """
    if verify:
        check_file(directory, record)
    path = directory / f"{record.stem}.arrow"
    table = map_table(path, _schema_of(directory))
    if table.num_rows != record.rows:
        raise DamagedError(
            f"{path} has {table.num_rows} rows where its record says {record.rows}; it is another part or was altered"
        )
    return table


def kind_of(directory: Path) -> str:
    """Return what a directory's parts are: sequences, targets or hidden."""
    if directory.name == "sequences":
        return "sequences"
    return "hidden" if directory.parent.name == "hidden" else "targets"


def _schema_of(directory: Path) -> pa.Schema:
    return {"sequences": SEQUENCES, "targets": TARGETS, "hidden": HIDDEN}[kind_of(directory)]

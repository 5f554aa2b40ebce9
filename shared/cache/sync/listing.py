"""`files.json`: size and checksum of every file of a cache, for servers that cannot list what they have.

Written last by a push, so it names nothing that is not there. Cost: one entry of 100 bytes per file; small files are
hashed, parts have their checksum from their records.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash
from pydantic import Field

from shared.cache.sync.cache_names import is_part, most_bytes, rank_of
from shared.parts.cache_files import hash_file
from shared.parts.part_stats import Strict
from shared.parts.records import parse_record, parse_sealed, read_record, sealed_json
from shared.remote.transfer import Remote, RemoteFile
from shared.schema import FORMAT_VERSION


class _Listed(Strict):
    """What `files.json` says of a file."""

    bytes: int = Field(ge=0)
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")


class _Listing(Strict):
    """What `files.json` says."""

    format: int
    files: dict[str, _Listed]


def read_listing(data: bytes, where: str) -> dict[str, RemoteFile]:
    """Return what `files.json` lists.

    Raises:
        DamagedError: it was altered.
    """
    document = parse_sealed(data, where, _Listing)
    return {name: RemoteFile(entry["bytes"], entry["xxh3"]) for name, entry in document["files"].items()}


def listing_of(path: Path, names: Iterable[str], remote: Remote | None = None) -> bytes:
    """Return what `files.json` says of files of a cache.

    Args:
        path: the cache on this machine.
        names: paths within it; a part is described by its record.
        remote: where files are that this machine lacks.

    Raises:
        DamagedError: a file cannot be read.
    """
    entries = {}
    for name in sorted(name for name in names if rank_of(name) is not None):
        of = f"{name.removesuffix('.arrow')}.json" if is_part(name) else name
        data = remote.read(of, most_bytes(of)) if remote is not None and not (path / of).is_file() else None
        if is_part(name):
            record = read_record(path / of) if data is None else parse_record(data, path / of)
            entries[name] = {"bytes": record.bytes, "xxh3": record.xxh3}
        else:
            xxh3, size = hash_file(path / of) if data is None else (xxhash.xxh3_128_hexdigest(data), len(data))
            entries[name] = {"bytes": size, "xxh3": xxh3}
    return sealed_json({"format": FORMAT_VERSION, "files": entries})

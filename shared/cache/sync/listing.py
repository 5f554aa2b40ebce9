"""Which files make up a cache, in which order they may appear where a reader looks meanwhile, and `files.json`: size
and checksum of each, for servers that cannot list what they have.

What others refer to comes first: the tokenizer and plans, layers, their parts, the rows' parts, cache.json; so a reader
sees no row without its targets, and no cache before it is whole. `files.json` is written last by a push, so it names
nothing that is not there. Cost: one match per name; one entry of 100 bytes per file; small files are hashed, parts have
their checksum from their records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import xxhash
from pydantic import Field

from shared.parts.cache_files import hash_file
from shared.parts.part_stats import Strict
from shared.parts.records import parse_record, parse_sealed, read_record, sealed_json
from shared.remote.transfer import Remote, RemoteFile
from shared.schema import (
    FORMAT_VERSION,
    JOB_PATTERN,
    LAYER_PATTERN,
    MAX_JSON_BYTES,
    MAX_TOKENIZER_FILE_BYTES,
    STEM_PATTERN,
    TOKENIZER_FILE_PATTERN,
)

_STEM, _LAYER = (re.sub(r"\?P<\w+>", "?:", pattern.pattern) for pattern in (STEM_PATTERN, LAYER_PATTERN))
_PART = rf"{_STEM}\.(?:json|arrow)"
_IN_ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        rf"tokenizer/{TOKENIZER_FILE_PATTERN.pattern}",
        rf"jobs/{JOB_PATTERN.pattern}/plan\.arrow",
        rf"(?:targets|hidden)/{_LAYER}/layer\.json",
        rf"(?:targets|hidden)/{_LAYER}/{_PART}",
        rf"sequences/{_PART}",
        r"cache\.json",
    )
)

_RANKS_OF_PARTS = (3, 4)


def rank_of(name: str) -> int | None:
    """Return a file's place in that order, by its path within the cache; None for what is no file of one.

    >>> [rank_of(name) for name in ("jobs/x", "sequences/part-0123abcd-000000.json", "cache.json", "../cache.json")]
    [None, 4, 5, None]
    """
    return next((rank for rank, pattern in enumerate(_IN_ORDER) if pattern.fullmatch(name)), None)


def is_part(name: str) -> bool:
    """Tell whether a file of a cache is a part's Arrow file, which its record describes."""
    return name.endswith(".arrow") and not name.startswith("jobs/")


def parts_in(names: Iterable[str]) -> set[str]:
    """Return those among files of a cache that are parts or their records.

    >>> sorted(parts_in(["cache.json", "sequences/part-0123abcd-000000.json"]))
    ['sequences/part-0123abcd-000000.json']
    """
    return {name for name in names if rank_of(name) in _RANKS_OF_PARTS}


def have_no_part_in_common(ours: set[str], theirs: set[str]) -> bool:
    """Tell whether two places hold parts, none of them the same: two caches, whose rows one place would join."""
    return bool(ours and theirs) and not ours & theirs


def most_bytes(name: str) -> int:
    """Return the most bytes of a small file: of the tokenizer, or JSON."""
    return MAX_TOKENIZER_FILE_BYTES if name.startswith("tokenizer/") else MAX_JSON_BYTES


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

"""Bring the small files of a cache behind a URL to its mirror: everything but the parts, which come when they are read.

What is there is asked once per process; files that are new or changed are fetched, in parallel, and each is compared
with its checksum before it is kept, JSON and plans with their own, the tokenizer with that in cache.json, so nothing
that was altered on the way or on the server stays. What was removed at the URL goes here too; what this machine made
and has not pushed stays.
Cost: one listing, one small request per new part.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shared.atomic import fill_atomic, make_dir, write_atomic
from shared.cache.layout import parse_header
from shared.cache.sync.listing import is_part, most_bytes, rank_of, read_listing
from shared.errors import CacheError, DamagedError
from shared.parts.cache_files import read_bounded, read_json
from shared.parts.jobs import Job
from shared.parts.records import json_bytes, parse_sealed
from shared.places import origin_of
from shared.remote.transfer import BLOCK_BYTES, LIST_FILE, PARALLEL, Remote, RemoteFile
from shared.schema import MAX_JSON_BYTES

VERSIONS_FILE = "versions.json"
"""In a mirror: the version of each small file as it was fetched or pushed."""


def list_remote(remote: Remote) -> dict[str, RemoteFile]:
    """Return the files of a cache at a URL by their path within it; what is no file of a cache is left out.

    Raises:
        CacheError: the place cannot be asked.
    """
    return {name: file for name, file in remote.list_files(read_listing).items() if rank_of(name) is not None}


@functools.cache
def _bring_once(path: Path) -> None:
    bring(path)


def bring_if_remote(path: Path) -> None:
    """Bring a mirror up to date, once per process; do nothing where a path is no mirror."""
    if origin_of(path) is not None:
        _bring_once(path)


def bring(path: Path) -> None:
    """Bring a mirror up to date with its URL.

    Raises:
        CacheError: nothing can be asked or fetched, or a part that this machine made is another one there.
        DamagedError: a file at the URL is not what was written.
    """
    origin = origin_of(path)
    assert origin is not None, f"{path} mirrors nothing"
    remote = Remote(origin)
    listed = {name: file for name, file in list_remote(remote).items() if not is_part(name)}
    known = read_versions(path)
    if not listed and not known and not path.exists():
        return
    new = [name for name, file in listed.items() if known.get(name) != file.version or not (path / name).is_file()]
    for name in known.keys() - listed.keys():
        (path / name).unlink(missing_ok=True)
    for folder in {(path / name).parent for name in new}:
        make_dir(folder)
    if any(name.startswith("tokenizer/") for name in new):
        listed = with_checksums(remote, listed)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda name: _fetch(remote, path, name, listed[name], name in known), sorted(new)))
    write_versions(path, {name: file.version for name, file in listed.items()})


def _fetch(remote: Remote, path: Path, name: str, listed: RemoteFile, replaces: bool) -> None:
    """Fetch a small file; a record that this machine made is not replaced."""
    target = path / name
    if not replaces and target.with_suffix(".arrow").is_file() and target.is_file():
        if read_bounded(target, MAX_JSON_BYTES) != read_small(remote, name, listed):
            raise CacheError(
                f"{remote.url}/{name} is another part than this machine made in {str(path)!r}; two builds went on "
                "apart: remove that directory to go on from what is there"
            )
        return
    fetch_small(remote, path, name, listed)


def fetch_small(remote: Remote, path: Path, name: str, listed: RemoteFile) -> None:
    """Fetch a file of a cache that is no part into its place below `path`; errors as for `read_small`."""
    if name.startswith("jobs/"):  # as long as the prompts are
        fill_atomic(path / name, lambda file: _copy_plan(remote, name, listed, file), "mirror", listed.size)
    else:
        write_atomic(path / name, read_small(remote, name, listed), "mirror")


def read_small(remote: Remote, name: str, listed: RemoteFile) -> bytes:
    """Return a small file's bytes, where they fit their own checksum, and the list's where that has one.

    Raises:
        CacheError: it cannot be fetched.
        DamagedError: it is not what was written.
    """
    where = f"{remote.url}/{name}"
    if listed.size > most_bytes(name):
        raise DamagedError(f"{where} has {listed.size:,} bytes where at most {most_bytes(name):,} are expected")
    with _listed_file(where):
        data = remote.read(name, most_bytes(name))
    if name.endswith(".json") and not name.startswith("tokenizer/"):
        parse_sealed(data, where)
    _compare(remote, name, listed, xxhash.xxh3_128_hexdigest(data))
    return data


@contextmanager
def _listed_file(where: str) -> Iterator[None]:
    """Say that a file which was listed is not there."""
    try:
        yield
    except FileNotFoundError:
        raise CacheError(
            f"{where} is listed and not there; run the same command again, or push the cache there again"
        ) from None


def _compare(remote: Remote, name: str, listed: RemoteFile, xxh3: str) -> None:
    """Compare a file's checksum with what a plain server's list, or else cache.json, says of it, if anything.

    Raises:
        DamagedError: they differ.
    """
    says = (listed.xxh3, "cache.json") if listed.xxh3 else (listed.version, LIST_FILE) if remote.lists_in_file else None
    if says is not None and says[0] != xxh3:
        raise DamagedError(f"{remote.url}/{name} is not what {remote.url}/{says[1]} lists; push the cache there again")


def with_checksums(remote: Remote, listed: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Return a listing with the checksums of the tokenizer's files, as cache.json has them; errors as for
    `read_small`.
    """
    if "cache.json" not in listed:
        return dict(listed)
    where = f"{remote.url}/cache.json"
    header = parse_header(read_small(remote, "cache.json", listed["cache.json"]), where)
    of_tokenizer = {f"tokenizer/{name}": entry["xxh3"] for name, entry in header.tokenizer_files.items()}
    return {name: file._replace(xxh3=of_tokenizer.get(name, "")) for name, file in listed.items()}


def _copy_plan(remote: Remote, name: str, listed: RemoteFile, file: BinaryIO) -> None:
    """Write a plan to a temporary file, and read all of it, which compares it with its checksums."""
    digest = xxhash.xxh3_128()
    for start in range(0, listed.size, BLOCK_BYTES):
        with _listed_file(f"{remote.url}/{name}"):
            piece = remote.read_range(name, start, min(start + BLOCK_BYTES, listed.size))
        file.write(piece)
        digest.update(piece)
    file.flush()
    _compare(remote, name, listed, digest.hexdigest())
    try:
        plan = Job(Path(name).parent, Path(file.name))
        for unit in range(plan.num_units):
            plan.unit(unit)
    except DamagedError as error:
        shown = re.escape(Path(file.name).name)
        raise DamagedError(re.sub(rf"\S*{shown}", f"{remote.url}/{name}", str(error))) from None


def read_versions(path: Path) -> dict[str, str]:
    """Return the versions of a mirror's files that came from its URL or are there already."""
    try:
        found: Mapping[str, Any] = read_json(path / VERSIONS_FILE) if (path / VERSIONS_FILE).exists() else {}
    except DamagedError:  # of this machine alone: what it says is asked again
        found = {}
    return {name: str(version) for name, version in found.items() if rank_of(name) is not None}


def write_versions(path: Path, versions: Mapping[str, str]) -> None:
    """Keep the versions of a mirror's files."""
    make_dir(path)
    write_atomic(path / VERSIONS_FILE, json_bytes(dict(versions)), "mirror")

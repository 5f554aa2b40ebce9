"""Pull a cache from a URL into a directory: what is missing, in parallel, each part compared with its record.

A part's record is written once its file is whole, cache.json last; so a pull that is killed leaves no half part and no
cache that is not whole, and the same command goes on, within the part where it stopped. A cache that is there already
must be the same one. Cost: one listing, one small request per file, one ranged request per `BLOCK_BYTES` of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

from shared.atomic import TEMPORARY_MARK, make_dir, write_atomic
from shared.cache.layout import refuse_within_cache
from shared.cache.sync.listing import have_no_part_in_common, is_part, parts_in, rank_of
from shared.cache.sync.mirror import fetch_small, list_remote, read_small, with_checksums
from shared.errors import CacheError, DamagedError, NamingError
from shared.parts.cache_files import read_bounded
from shared.parts.records import parse_record
from shared.process.failpoints import failpoint
from shared.remote.part_store import fill_checked
from shared.remote.transfer import CARD_FILE, LIST_FILE, PARALLEL, Remote, RemoteFile
from shared.schema import MAX_JSON_BYTES

_ENTRIES = ("cache.json", "tokenizer", "jobs", "targets", "hidden", "sequences", LIST_FILE, CARD_FILE)
"""At the top of a cache's directory."""


def pull_cache(remote: Remote, path: Path, advance: Callable[[int], object] = lambda files: None) -> int:
    """Pull a cache into a directory, new or of an earlier pull; return how many files came.

    Raises:
        UsageError: the directory lies in another cache.
        CacheError: there is no cache at the URL, or another one in the directory.
        DamagedError: a file at the URL is not what was committed.
    """
    refuse_within_cache(path)
    listed = list_remote(remote)
    if "cache.json" not in listed:
        raise NamingError(f"{remote.url} is not a cache (it has no cache.json); correct the URL")
    header = read_small(remote, "cache.json", listed["cache.json"])
    if (path / "cache.json").exists() and read_bounded(path / "cache.json", MAX_JSON_BYTES) != header:
        raise NamingError(f"{path} holds another cache than {remote.url}; name another directory")
    _refuse_another(remote, path, parts_in(listed))
    listed = with_checksums(remote, listed)
    names = sorted((name for name in listed if not is_part(name)), key=lambda name: (rank_of(name), name))
    for folder in {(path / name).parent for name in names}:
        make_dir(folder)
    came = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _, group in groupby(names, key=rank_of):
            for new in pool.map(lambda name: _pull(remote, path, name, listed), list(group)):
                came += new
                advance(1)
    return came


def _refuse_another(remote: Remote, path: Path, theirs: set[str]) -> None:
    """Refuse a directory of other files, and one with parts of which the URL has none: two would become one."""
    if not path.is_dir():
        return
    others = sorted(each.name for each in path.iterdir() if each.name not in _ENTRIES and each.name[0] != ".")
    if others and not (path / "cache.json").exists():
        raise NamingError(f"{path} holds '{others[0]}' and is no cache; name another directory")
    files = [file.relative_to(path).as_posix() for pattern in ("*/*.json", "*/*/*.json") for file in path.glob(pattern)]
    ours = parts_in(files)
    if have_no_part_in_common(ours, theirs):
        found = f"{min(ours)} and no part of {remote.url}"
        raise NamingError(f"{path} holds {found}: another cache; name another directory")


def _pull(remote: Remote, path: Path, name: str, listed: dict[str, RemoteFile]) -> int:
    """Bring one small file, and its part before it where it is a record; return how many files came."""
    target, where = path / name, f"{remote.url}/{name}"
    arrow = name.removesuffix(".json") + ".arrow"
    if not name.startswith(("sequences/", "targets/", "hidden/")) or name.endswith("layer.json"):
        if target.is_file() and target.stat().st_size == listed[name].size:
            return 0
        fetch_small(remote, path, name, listed[name])
        return 1
    data = read_small(remote, name, listed[name])
    record = parse_record(data, target)
    if target.exists():
        if read_bounded(target, MAX_JSON_BYTES) != data:
            raise CacheError(f"{target} is another part than {where}; name another directory")
        return 0
    if arrow not in listed or listed[arrow].size != record.bytes:
        raise DamagedError(f"{remote.url}/{arrow} is not there as its record says; push the cache there again")
    file = path / arrow
    unfinished = file.with_name(f".{file.name}{TEMPORARY_MARK}pull")
    fill_checked(
        file, unfinished, f"{remote.url}/{arrow}", record.bytes, record.xxh3, partial(remote.read_range, arrow)
    )
    failpoint("pull.before_record")
    write_atomic(target, data, "pull")
    return 2

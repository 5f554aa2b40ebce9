"""Push a cache to a URL or a directory: what is missing there, in parallel, in an order that a reader may meet halfway.

A part's file goes before its record, parts before what counts them, cache.json last; so a push that is killed leaves
no half part, and the same command goes on with what is missing. Each part is compared with its record before it goes.
What is there already must be what is here: a record that differs is refused, never replaced.
Cost: one listing before and one after, one small request per file that is there already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from shared.cache.layout import all_layers, read_header, refuse_within_cache, sequences_dir
from shared.cache.sync.listing import have_no_part_in_common, listing_of, most_bytes, parts_in, rank_of, read_listing
from shared.cache.sync.mirror import list_remote
from shared.cache.tokenizer_files import read_tokenizer_file
from shared.errors import CacheError, DecantError, NamingError
from shared.parts.cache_files import read_bounded
from shared.parts.jobs import list_jobs
from shared.parts.part_file import part_file
from shared.parts.parts import check_file
from shared.parts.records import PartRecord, list_records
from shared.places import origin_of
from shared.process.failpoints import failpoint
from shared.remote.transfer import CARD_FILE, LIST_FILE, PARALLEL, Remote, RemoteFile

INTERVAL_SECONDS = 2.0
"""Between two looks for parts that a build has committed."""


class PushSummary(NamedTuple):
    """What a push did."""

    files: int
    """Written now."""
    bytes: int
    already_there: int
    """Files."""
    unfinished: int
    """Files that other pushes are at, or left half when they were killed."""


class _Item(NamedTuple):
    """One file of the cache, with its record where it is a part's."""

    name: str
    record: PartRecord | None
    entry: Mapping[str, Any] | None = None
    """What cache.json says of a file of the tokenizer."""


def files_of(path: Path) -> list[_Item]:
    """Return the files of a cache in the order in which they may appear elsewhere.

    Raises:
        CacheError: the path is no cache, or one of its small files is damaged.
    """
    header = read_header(path)
    items = [_Item("cache.json", None)]
    items += [_Item(f"tokenizer/{name}", None, entry) for name, entry in header.tokenizer_files.items()]
    items += [_Item(f"jobs/{job.id}/plan.arrow", None) for job in list_jobs(path)]
    folders = [sequences_dir(path)]
    for layer in all_layers(path):
        folders.append(layer.directory)
        items.append(_Item(f"{layer.directory.relative_to(path)}/layer.json", None))
    for folder in folders:
        items += [_Item(f"{folder.relative_to(path)}/{record.stem}.json", record) for record in list_records(folder)]
    return sorted(items, key=lambda item: (rank_of(item.name), item.name))


def push_cache(
    path: Path,
    remote: Remote,
    card: bytes | None = None,
    advance: Callable[[int], object] = lambda files: None,
    *,
    is_mirror: bool = False,
) -> PushSummary:
    """Push a cache.

    Args:
        path: the cache, a directory of this machine or a mirror.
        remote: where to.
        card: README.md of the place; None leaves the one that is there.
        advance: told the files that are done.
        is_mirror: the path mirrors that place, so parts of others there are of the same cache.

    Raises:
        UsageError: the place lies in another cache.
        CacheError: nothing can be written there, or another cache is, or other files.
        DamagedError: a part or a file of the tokenizer is not what was committed, or is missing.
    """
    if remote.lists_in_file:
        raise NamingError(
            f"{remote.url} can be read only; push to the directory that is served, or to s3://, gs:// or hf://"
        )
    there = _cache_at(remote)
    if not there or remote.scheme == "file":
        refuse_within_cache(remote.url)
    items = files_of(path)
    if not is_mirror:
        _refuse_another(remote, parts_in(_names(items)), parts_in(there))
    written: list[int] = []
    with ThreadPoolExecutor(1 if remote.files_per_write > 1 else PARALLEL) as pool:
        for _, group in groupby(items, key=lambda item: rank_of(item.name)):
            batches = _batches(list(group), remote.files_per_write)
            for new in pool.map(lambda batch: _push(path, remote, batch, there), batches):
                written += new
                advance(len(new))
    listed, sizes = remote.list_files(read_listing), _sizes(path, items)
    found = {name: file for name, file in listed.items() if rank_of(name) is not None}
    for name, size in sizes.items():
        if name not in found or found[name].size != size:
            at = f"{found[name].size:,}" if name in found else "no"
            raise CacheError(
                f"{remote.url}/{name} has {at} bytes after it was pushed where it has {size:,} here; push again"
            )
    extra = [(LIST_FILE, listing_of(path, found, remote))]  # also of what another machine pushed
    remote.write_all(extra if card is None else [*extra, (CARD_FILE, card)])
    unfinished = len(remote.unfinished(list(listed)))
    return PushSummary(len(written), sum(written), len(sizes) - len(written), unfinished)


def _cache_at(remote: Remote) -> dict[str, RemoteFile]:
    """Return the files of the cache, whole or half, that is there already.

    Raises:
        CacheError: what is there is something else.
    """
    found = remote.list_files(read_listing)
    there = {name: file for name, file in found.items() if rank_of(name) is not None}
    others = [name for name in sorted(found) if name not in (LIST_FILE, CARD_FILE) and Path(name).name[0] != "."]
    if others and not there:
        raise NamingError(f"{remote.url} holds '{others[0]}' and is no cache; push to a place of the cache's own")
    return there


def _refuse_another(remote: Remote, ours: set[str], theirs: set[str]) -> None:
    """Refuse a place with parts of which this cache has none: its rows would join those of another cache."""
    if have_no_part_in_common(ours, theirs):
        raise NamingError(
            f"{remote.url} holds {min(theirs)} and no part of this cache: another cache is there; push to another "
            "place, or join both with `decant cache merge` and push the result to a place of its own"
        )


def _batches(items: Sequence[_Item], size: int) -> list[list[_Item]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _push(path: Path, remote: Remote, batch: Sequence[_Item], there: Mapping[str, RemoteFile]) -> list[int]:
    """Write what is missing of some files; return the sizes of what was written."""
    files: list[tuple[str, Path | bytes]] = []
    sizes: list[int] = []
    for name, record, entry in batch:
        if record is None and name.startswith("jobs/"):
            size = (path / name).stat().st_size
            if name not in there or there[name].size != size:
                files.append((name, path / name))
                sizes.append(size)
            continue
        if entry is not None:
            data = read_tokenizer_file(path, name.removeprefix("tokenizer/"), entry)
        else:
            data = read_bounded(path / name, most_bytes(name))
        known = name in there and _is_same(remote, name, data)
        arrow = _arrow(name)
        if record is not None and not (known and arrow in there and there[arrow].size == record.bytes):
            check_file((path / name).parent, record)
            files.append((arrow, part_file((path / name).parent, record)))
            sizes.append(record.bytes)
        if not known:
            files.append((name, data))
            sizes.append(len(data))
    if files:
        failpoint("push.before_write")
        remote.write_all(files)
        failpoint("push.after_write")
    return sizes


def _is_same(remote: Remote, name: str, data: bytes) -> bool:
    """Tell whether a small file is there as it is here.

    Raises:
        CacheError: it is another one.
    """
    try:
        other = remote.read(name, max(len(data), most_bytes(name)))
    except FileNotFoundError:
        return False
    if other != data:
        raise CacheError(
            f"{remote.url}/{name} is another one than this cache has; another cache is there, or another build went "
            "on: push to another place"
        )
    return True


def _sizes(path: Path, items: Sequence[_Item]) -> dict[str, int]:
    sizes = {item.name: (path / item.name).stat().st_size for item in items}
    return sizes | {_arrow(item.name): item.record.bytes for item in items if item.record is not None}


def _names(items: Sequence[_Item]) -> list[str]:
    return [item.name for item in items] + [_arrow(item.name) for item in items if item.record is not None]


def _arrow(name: str) -> str:
    """Return a part's file by its record's name."""
    return f"{name.removesuffix('.json')}.arrow"


@contextmanager
def pushed_as_committed(path: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Push a mirror's parts while a build commits them, and the rest at its end; do nothing for a directory.

    What cannot be pushed on the way is said and tried again; at the end it is an error, unless the build itself failed.

    Raises:
        CacheError: the last push failed.
    """
    origin = origin_of(path)
    if origin is None:
        yield
        return
    remote, stop = Remote(origin), threading.Event()

    def push_now_and_then() -> None:
        """Push what is new until the build ends."""
        done: set[str] = set()
        while not stop.wait(INTERVAL_SECONDS):
            try:
                done |= push_new(path, remote, done)
            except DecantError as error:
                note(f"teach: {error}; it is tried again")

    thread = threading.Thread(target=push_now_and_then, daemon=True, name="push")
    thread.start()
    try:
        yield
    except BaseException:
        _end(stop, thread)
        try:
            _push_rest(path, remote)
        except DecantError as error:  # the build's own failure is the one to report
            note(f"teach: {error}; the same command pushes it")
        raise
    _end(stop, thread)
    _push_rest(path, remote)


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()


def _push_rest(path: Path, remote: Remote) -> None:
    if (path / "cache.json").is_file():
        push_cache(path, remote, is_mirror=True)


def push_new(path: Path, remote: Remote, done: set[str]) -> set[str]:
    """Push what a build has committed and `done` does not name; return the names to add to `done`."""
    if not (path / "cache.json").is_file():
        return set()
    new = [item for item in files_of(path) if item.name not in done]
    if new:
        there = list_remote(remote)
        for batch in _batches(new, remote.files_per_write):
            _push(path, remote, batch, there)
    return {item.name for item in new}

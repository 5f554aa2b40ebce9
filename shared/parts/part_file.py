"""Where a part's Arrow file is on this machine: in its directory, or fetched, where the cache mirrors a URL.

Cost: nothing beside a directory; of a mirror the transfer of the part the first time, its checksum once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from shared.errors import DamagedError
from shared.parts.records import PartRecord
from shared.places import origin_of
from shared.remote.part_store import fetch_part
from shared.remote.transfer import Remote

_MOST_ATTEMPTS = 5
"""Another process that needs room may take a part away just before it is opened."""

Result = TypeVar("Result")


def part_file(directory: Path, record: PartRecord) -> Path:
    """Return the Arrow file of a committed part of `sequences/` or of a layer, fetched where it has to be.

    Raises:
        DamagedError: what came from the URL is not what was committed, or nothing is there.
        CacheError: it cannot be fetched or kept.
    """
    path = directory / f"{record.stem}.arrow"
    where, origin = origin_of(path), origin_of(directory)
    if where is None or origin is None or path.exists():
        return path
    remote = Remote(origin)
    return fetch_part(where, record.bytes, record.xxh3, partial(remote.read_range, path.name))


def with_part_file(directory: Path, record: PartRecord, use: Callable[[Path], Result]) -> Result:
    """Return what `use` makes of a part's file; a problem that it names is said of the part's own place.

    Raises:
        DamagedError: `use` says so; else as for `part_file`.
    """
    path = directory / f"{record.stem}.arrow"
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        file = part_file(directory, record)
        try:
            return use(file)
        except DamagedError as error:
            if file == path or file.exists() or attempt == _MOST_ATTEMPTS:
                raise DamagedError(str(error).replace(str(file), str(path))) from None
    raise AssertionError("the last attempt returns or raises")

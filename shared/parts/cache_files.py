"""The one place that opens files of a cache: regular ones, no links, of a size that is bounded before anything is read.

A cache may come from strangers, so a name of it may be a pipe, a device, a directory or a link to a file of this
machine. A file is looked at before it is opened, opened without following a link or waiting for a writer, and looked
at again. Folders are looked at where they are listed. Cost: three system calls per file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import DamagedError, refused
from shared.schema import MAX_JSON_BYTES, MAX_JSON_VALUES
from shared.special_files import SPECIAL_KINDS
from shared.text.strict_json import each_once

_MOST_DIGITS = 19
_KINDS = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a directory", **SPECIAL_KINDS}


def arrow_name(path: Path) -> bytes:
    r"""Return a path as Arrow takes it under any name: of a text it makes UTF-8, which `caf\xe9` is not.

    >>> arrow_name(Path("part-1.arrow"))
    b'part-1.arrow'
    """
    return os.fsencode(path)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        DamagedError: it cannot be read, or is a link, a directory, a pipe or a device.
    """
    try:
        _refuse_special(path, os.lstat(path).st_mode, stat.S_IFREG)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        _refuse_special(path, os.fstat(descriptor).st_mode, stat.S_IFREG)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    return file


def unreadable(path: Path, error: OSError | ValueError) -> DamagedError:
    """Return one sentence for a file that the system does not give."""
    return DamagedError(f"{path} cannot be read: {refused(error) if isinstance(error, OSError) else error}")


def _refuse_special(path: Path, mode: int, wanted: int) -> None:
    if stat.S_IFMT(mode) != wanted:
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        expected = "directory" if wanted == stat.S_IFDIR else "regular file"
        raise DamagedError(f"{path} is {found} where a cache has a {expected}; put the {expected} itself there")


def read_bounded(path: Path, most: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        DamagedError: it cannot be read, is no regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DamagedError(f"{path} has {size:,} bytes where at most {most:,} are expected")
        try:
            data = file.read(size + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    if len(data) > size:
        raise DamagedError(f"{path} grew while it was read; read it again once nothing writes it")
    return data


def hash_file(path: Path) -> tuple[str, int]:
    """Return xxh3-128 in hexadecimal and the size in bytes of a regular file, read in pieces.

    Raises:
        DamagedError: it cannot be read or is no regular file.
    """
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest(), file.tell()
        except OSError as error:
            raise unreadable(path, error) from None


def list_folder(directory: Path) -> list[str]:
    """Return the names in a folder of a cache, sorted; none where it is missing.

    Raises:
        DamagedError: it cannot be read, is a link or is no directory.
    """
    try:
        _refuse_special(directory, os.lstat(directory).st_mode, stat.S_IFDIR)
        return sorted(entry.name for entry in os.scandir(directory))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise unreadable(directory, error) from None


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Return a JSON object whose numbers are finite and fit 64 bits, and in which no key comes twice; surrogates are
    let through.

    Raises:
        DamagedError: something else, or so many values that they would take more memory than the text by far.
    """
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > MAX_JSON_VALUES:
        raise DamagedError(f"{where} holds more than {MAX_JSON_VALUES:,} values; it was altered after it was written")
    try:
        document = json.loads(
            data.decode("utf-8", "surrogatepass"),
            object_pairs_hook=each_once,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_real,
        )
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON ({error}); it was altered after it was written") from None
    if not isinstance(document, dict):
        raise DamagedError(f"{where} holds a {type(document).__name__} where a JSON object is expected")
    return document


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise ValueError(f"the number {text[:30]} is not finite")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size from a regular file; errors as for `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES), path)

"""From a file to rows, one at a time: JSON lines, JSON lists, tables of text, plain texts, parquet and arrow.

JSON lines are handed on as text, because only then does an error know its line. JSON lists are streamed by ijson, csv
by the standard library (every value stays the text that it is), parquet and arrow by `datasets`. Compressed files are
read member by member; one that ends in the middle is refused, also a .zst, whose usual readers take the end of the file
for the end of the data.
Cost: one pass, memory for one row (one row group of parquet).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from shared import strict_json
from shared.errors import PromptError
from shared.text_encoding import other_encoding
from teacher_cache.prompts.files.prompt_directories import kind_of

MAX_LINE_BYTES = 16 * 2**20
"""Longest line, or plain text, that is read."""
BLOCK_BYTES = 2**18

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What stands for bytes that are not UTF-8."""

Numbered = tuple[int, Any]
"""Line or row from 1, and the row: a mapping, a line of JSON that is not parsed yet, or a ValueError that says what is
wrong.
"""


def read_file(path: Path) -> Iterator[Numbered]:
    """Yield the rows of a local file.

    Raises:
        PromptError: it cannot be read from some row on.
    """
    number = 0
    readers = {"json": _json, "csv": _csv, "txt": _text}
    kind = str(kind_of(path))
    try:
        if kind in readers:
            _require_utf8(path)
        for number, row in readers[kind](path) if kind in readers else _table(path, kind):
            yield number, row
    except PromptError:
        raise
    except Exception as error:  # each library raises whatever it likes; all of it means unreadable
        raise PromptError(f"{path}:{number + 1}: cannot be read as {kind} from here on ({reason_of(error)})") from error


def reason_of(error: BaseException) -> str:
    """Return another library's message as one line of at most 300 characters, or its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of nested objects that are null: parquet gives every object all keys."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, decompressed by its ending; a compressed file that ends in the middle raises EOFError at its end."""
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path))
    if path.suffix == ".bz2":
        return cast("BinaryIO", bz2.open(path))
    if path.suffix == ".xz":
        return cast("BinaryIO", lzma.open(path))
    if path.suffix == ".zst":
        return cast("BinaryIO", io.BufferedReader(_Zstandard(path), BLOCK_BYTES))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file, one after another."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        """The frame that is open; None between two."""
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes; 0 at the end."""
        while not self._ready:
            self._packed = self._packed or self._file.read(BLOCK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a zstandard frame; get it again")
                return 0
            self._frame = self._frame or self._new()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _require_utf8(path: Path) -> None:
    with open_bytes(path) as file:
        reason = other_encoding(file.read(4))
    if reason:
        raise PromptError(f"{path}:1: {reason}")


def _json(path: Path) -> Iterator[Numbered]:
    with open_bytes(path) as file:
        start = file.read(3)
        while start and not start.strip(b"\xef\xbb\xbf \t\r\n"):
            start = file.read(1)
    if path.suffixes and ".json" in path.suffixes and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_list(path)
    else:
        yield from _lines(path)


def _json_list(path: Path) -> Iterator[Numbered]:
    import ijson

    with open_bytes(path) as file:
        if cast("io.BufferedReader", file).peek(3)[:3] == b"\xef\xbb\xbf":
            file.read(3)
        for number, row in enumerate(ijson.items(file, "item", use_float=True, map_type=_Once), start=1):
            key = _key_twice(row)
            yield number, row if key is None else ValueError(strict_json.said_of(key))


class _Once(dict[str, Any]):
    """An object that notes a key which it has twice.

    An error raised here would not pass through ijson, and a list beside the file would not tell rows apart: ijson makes
    the rows of a whole block before it hands on the first of them.
    """

    twice: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.twice = key
        super().__setitem__(key, value)


def _key_twice(value: Any) -> str | None:
    """Return a key that an object has twice, at any depth."""
    if isinstance(value, _Once) and value.twice is not None:
        return value.twice
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for key in map(_key_twice, inside) if key is not None), None)


def _lines(path: Path) -> Iterator[Numbered]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            length = len(line)
            while not line.endswith("\n") and (more := file.readline(MAX_LINE_BYTES)):
                length += len(more)
                line = more
            if length > MAX_LINE_BYTES:
                yield number, ValueError(f"the line has {length:,} characters; at most {MAX_LINE_BYTES:,} are read")
            elif not line.isascii() and (found := _NOT_UTF8.search(line)):
                byte = ord(found[0]) - 0xDC00
                reason = (
                    f"the line is not UTF-8 at column {found.start() + 1} (byte {byte:#x}); convert the file to UTF-8"
                )
                yield number, ValueError(reason)
            elif line.strip("\ufeff \t\r\n"):
                yield number, line.rstrip("\r\n")


def _csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        names = next(reader, [])
        if len(set(names)) != len(names) or not all(names):
            raise PromptError(
                f"{path}:1: the first line must name each column once, found {', '.join(map(repr, names))[:200]}"
            )
        number = reader.line_num + 1
        while (values := _next(reader, path, number)) is not None:
            if values and len(values) != len(names):
                yield (
                    number,
                    ValueError(f"the row has {len(values)} values and the first line names {len(names)} columns"),
                )
            elif values:
                yield number, dict(zip(names, values, strict=True))
            number = reader.line_num + 1


def _next(reader: Iterator[list[str]], path: Path, number: int) -> list[str] | None:
    try:
        return next(reader, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise PromptError(f"{path}:{number}: cannot be read as csv from here on ({reason_of(error)})") from error


def _text(path: Path) -> Iterator[Numbered]:
    with open_bytes(path) as file:
        data = file.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        reason = f"the file is one text of more than {MAX_LINE_BYTES:,} bytes; split it into files or write JSON lines"
        yield 1, ValueError(reason)
        return
    try:
        yield 1, {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield 1, ValueError(f"the file is not UTF-8 at byte {error.start}; convert it")


def _table(path: Path, kind: str) -> Iterator[Numbered]:
    import datasets

    name = str(path).replace("[", "[[]")
    rows = datasets.load_dataset(kind, split="train", streaming=True, data_files=name)
    for number, row in enumerate(rows, start=1):
        yield number, without_nulls(row)


def read_hub(path: str, revision: str, split: str, config: str | None) -> Iterator[Numbered]:
    """Yield the rows of a hub data set.

    Raises:
        PromptError: it has no such split or configuration, or cannot be read from some row on.
    """
    import datasets

    number = 0
    options: dict[str, Any] = {"name": config} if config is not None else {}
    try:
        rows = datasets.load_dataset(path, split=split, streaming=True, revision=revision, **options)
        for number, row in enumerate(rows, start=1):
            yield number, without_nulls(row)
    except Exception as error:  # as above
        way_out = "" if number else "; name what it has in `split` and `config`"
        raise PromptError(f"{path}:{number + 1}: cannot be read from here on ({reason_of(error)}){way_out}") from error

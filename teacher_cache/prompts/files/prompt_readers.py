"""From a file to rows, one at a time: JSON lines, JSON lists, tables of text, plain texts, parquet and arrow.

JSON lines are handed on as text, because only then does an error know its line. JSON lists are read entry by entry, csv
by the standard library (every value stays the text that it is), parquet and arrow by tables.py. Of text, no row longer
than MAX_LINE_BYTES is read.
Cost: one pass, memory for one row (one row group of parquet).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import PromptError, reason_of
from shared.text.file_endings import endings
from shared.text.text_encoding import not_utf8, other_encoding
from teacher_cache.prompts.files.json_lists import read_list
from teacher_cache.prompts.files.packed_files import BLOCK_BYTES, open_bytes
from teacher_cache.prompts.files.prompt_directories import kind_of

MAX_LINE_BYTES = 16 * 2**20
"""Longest line, or plain text, that is read."""
ENDLESS_BYTES = 2**30
"""Of a line beyond which no further is looked for: the file is zeros, or of another kind."""
_CUT = "the file ends in the middle, {}; get it again, or remove its last line"
_TEXTS = (
    "the row is text but must be an object with named fields; where it is a prompt: jq -c '.[] | {prompt: .}' OLD > "
    "NEW.jsonl"
)
_POINTER = b"version https://git-lfs.github.com/spec/"

Numbered = tuple[int, Any]
"""Line or row from 1, and the row: a mapping, a line of JSON that is not parsed yet, or a ValueError that says what is
wrong.
"""


def read_file(path: Path, separator: str | None = None, *, by_line: bool = False) -> Iterator[Numbered]:
    """Yield the rows of a local file.

    Args:
        path: ends in a kind that is read.
        separator: what stands between the columns of csv, where it is known.
        by_line: let each line of a .txt be a text, not the whole file.

    Raises:
        PromptError: it cannot be read from some row on.
    """
    number = 0
    readers: dict[str, Callable[[Path], Iterator[Numbered]]] = {
        "json": _json,
        "csv": partial(_csv, separator=separator),
        "txt": _text_lines if by_line else _text,
    }
    kind = str(kind_of(path))
    try:
        _refuse_pointer(path)
        if kind in readers:
            _require_utf8(path)
        for number, row in readers[kind](path) if kind in readers else _table(path, kind):
            yield number, row
    except PromptError:
        raise
    except Exception as error:  # each library raises whatever it likes; all of it means unreadable
        raise PromptError(f"{path}:{number + 1}: cannot be read as {kind} from here on ({reason_of(error)})") from error


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of nested objects that are null: parquet gives every object all keys."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _refuse_pointer(path: Path) -> None:
    """Refuse what git leaves in place of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise PromptError(
                f"{path}: holds a pointer of git LFS and no data, which was not fetched; run `git lfs pull` there, or "
                "download the file"
            )


def _require_utf8(path: Path) -> None:
    with open_bytes(path) as file:
        reason = other_encoding(file.read(4))
    if reason:
        raise PromptError(f"{path}:1: {reason}")


def _json(path: Path) -> Iterator[Numbered]:
    if ".json" in endings(path) and _starts_list(path):
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, entry in enumerate(read_list(file, MAX_LINE_BYTES), start=1):
                yield number, ValueError(_TEXTS) if isinstance(entry, str) else entry
    else:
        yield from _lines(path, of_objects=True)


def _starts_list(path: Path) -> bool:
    with open_bytes(path) as file:
        start = file.read(3).removeprefix(b"\xef\xbb\xbf")
        for _ in range(MAX_LINE_BYTES // BLOCK_BYTES):
            start = start.lstrip(b" \t\r\n")
            if start:
                return start.startswith(b"[")
            start = file.read(BLOCK_BYTES)
    return False


def _lines(path: Path, *, of_objects: bool) -> Iterator[Numbered]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            length = len(line)
            while not line.endswith("\n") and (more := file.readline(MAX_LINE_BYTES)):
                length += len(more)
                line = more
                if length > ENDLESS_BYTES:
                    raise PromptError(
                        f"{path}:{number}: the line has more than {ENDLESS_BYTES:,} characters; expected a row in each "
                        "line, so convert the file"
                    )
            if length > MAX_LINE_BYTES:
                yield number, ValueError(f"the line has {length:,} characters; at most {MAX_LINE_BYTES:,} are read")
            elif line.strip("\ufeff \t\r\n"):
                if of_objects and not line.endswith("\n"):
                    _require_whole(line.strip("\ufeff \t\r"))
                said = not_utf8(line)
                yield number, ValueError(f"the line {said}") if said else line.rstrip("\r\n")


def _require_whole(line: str) -> None:
    """Refuse a last line that ends within an object: the file was cut, and how much is missing nobody knows.

    Raises:
        ValueError: it does.
    """
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(line) or "Unterminated" in error.msg
        if line.startswith("{") and (at_end or not line.endswith("}")):
            raise ValueError(_CUT.format("within an object")) from None
    except (ValueError, RecursionError):
        return  # whoever parses it says so


def _csv(path: Path, separator: str | None) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _RecordLines(file)
        reader = csv.reader(lines, delimiter=separator or _separator(path), strict=True)
        names = _next(reader, path, 1) or []
        if said := not_utf8("".join(names)):
            raise PromptError(f"{path}:1: the first line {said}")
        if len(set(names)) != len(names) or not all(names):
            raise PromptError(
                f"{path}:1: the first line must name each column once, found {', '.join(map(repr, names))[:200]}"
                f"{'' if all(names) else '; name every column (pandas: to_csv(..., index=False))'}"
            )
        number = reader.line_num + 1
        lines.begin()
        while (values := _next(reader, path, number)) is not None:
            if values and len(values) < len(names) and not lines.last.endswith(("\n", "\r")):
                raise PromptError(f"{path}:{number}: {_CUT.format(f'within a row of {len(names)} columns')}")
            if values and len(values) != len(names):
                yield (
                    number,
                    ValueError(f"the row has {len(values)} values and the first line names {len(names)} columns"),
                )
            elif values:
                said = not_utf8(" ".join(values))
                yield number, ValueError(f"the row {said}") if said else dict(zip(names, values, strict=True))
            number = reader.line_num + 1
            lines.begin()


def _separator(path: Path) -> str:
    """Return what stands between the columns that the first line names: by that line, where it has no comma."""
    if ".tsv" in endings(path):
        return "\t"
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline(MAX_LINE_BYTES)
    for separator in ",;\t":
        with contextlib.suppress(csv.Error):
            if len(next(csv.reader([first], delimiter=separator, strict=True), ())) > 1:
                return separator
    return ","


class _RecordLines:
    """Lines of a file for records of a bounded length, which may take several of them."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self._length = 0
        self.last = ""
        """The line that was read last."""

    def __iter__(self) -> _RecordLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES - self._length + 1)
        self._length += len(line)
        if self._length > MAX_LINE_BYTES:
            raise csv.Error(f"a row has more than {MAX_LINE_BYTES:,} characters")
        if not line:
            raise StopIteration
        self.last = line
        return line

    def begin(self) -> None:
        """Count from here: a record begins."""
        self._length = 0


def _next(reader: Iterator[list[str]], path: Path, number: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise PromptError(f"{path}:{number}: cannot be read as csv from here on ({reason_of(error)})") from error


def _text(path: Path) -> Iterator[Numbered]:
    with open_bytes(path) as file:
        data = file.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        reason = f"the file is one text of more than {MAX_LINE_BYTES:,} bytes; split it into files or write JSON lines"
        yield 1, ValueError(reason)
        return
    text = data.decode("utf-8-sig", "surrogateescape")
    said = not_utf8(text)
    yield 1, ValueError(f"the text {said}") if said else {"text": text}


def _text_lines(path: Path) -> Iterator[Numbered]:
    for number, line in _lines(path, of_objects=False):
        yield number, {"text": line} if isinstance(line, str) else line


def _table(path: Path, kind: str) -> Iterator[Numbered]:
    from teacher_cache.prompts.files.tables import arrow_rows, parquet_rows

    rows = parquet_rows(path) if kind == "parquet" else arrow_rows(path)
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, ValueError) else without_nulls(row)

"""Rows of a task's file, one JSON object after another, each with its place.

`.jsonl` (or `.jsonl.gz`) has one object per line; `.json` (or `.json.gz`) is one list of objects, or one object whose
values are the rows, as PubMedQA is published. A place is path:line, or path:number of the entry from 1. Sizes are
bounded before anything is parsed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError, refused
from shared.text import strict_json
from shared.text.file_endings import ends_in
from shared.text.text_encoding import not_utf8, other_encoding

MAX_FILE_BYTES = 1 << 30
MAX_WHOLE_FILE_BYTES = 1 << 28
"""Of a file that must be parsed in one piece."""
MAX_LINE_BYTES = 16 << 20


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) in the order of the file.

    Raises:
        EvaluationError: the file cannot be read or is not of one of these shapes.
    """
    whole = ends_in(path, ".json", ".json.gz")
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise EvaluationError(f"{path}: is no regular file; name a jsonl or json file (or one ending in .gz)")
        opened = gzip.open(path, "rb") if ends_in(path, ".gz") else path.open("rb")  # noqa: SIM115
        with opened as stream:
            yield from _entries(stream, path) if whole else _lines(stream, path)
    except (OSError, EOFError, zlib.error) as error:
        named = "name a jsonl or json file (or one ending in .gz)"
        reason = refused(error) if isinstance(error, OSError) and error.errno else f"{error}; {named}"
        raise EvaluationError(f"{path}: cannot read the task's questions: {reason}") from error


def _lines(stream: BufferedIOBase, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    num_bytes, number = 0, 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number, num_bytes = number + 1, num_bytes + len(line)
        if len(line) > MAX_LINE_BYTES or num_bytes > MAX_FILE_BYTES:
            raise EvaluationError(
                f"{path}:{number}: more than {MAX_LINE_BYTES} bytes in a line or {MAX_FILE_BYTES} in the file"
            )
        if line.strip():
            yield f"{path}:{number}", _object(_parsed(line, f"{path}:{number}", "a JSON object"), f"{path}:{number}")


def _entries(stream: BufferedIOBase, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = stream.read(MAX_WHOLE_FILE_BYTES + 1)
    if len(text) > MAX_WHOLE_FILE_BYTES:
        raise EvaluationError(
            f"{path}: more than {MAX_WHOLE_FILE_BYTES} bytes in one piece; write it as jsonl, a row per line"
        )
    found = _parsed(text, str(path), "a list of rows, or an object of them")
    if not isinstance(found, list | dict):
        raise EvaluationError(f"{path}: expected a list of rows, or an object of them, found {text[:60]!r}")
    for number, row in enumerate(found.values() if isinstance(found, dict) else found, start=1):
        yield f"{path}:{number}", _object(row, f"{path}:{number}")


def _parsed(text: bytes, place: str, wanted: str) -> Any:
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        if reason := other_encoding(text[:4]):
            raise EvaluationError(f"{place}: {reason}") from error
        if said := not_utf8(text.decode("utf-8", "surrogateescape")):
            raise EvaluationError(f"{place}: the text {said}") from error
        raise EvaluationError(f"{place}: expected {wanted}, found {text[:60]!r} ({error})") from error


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise EvaluationError(f"{place}: expected a JSON object, found {json.dumps(row)[:60]}")
    return row

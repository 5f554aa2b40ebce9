"""Prompts: files or hub data sets in five formats, or another cache, read one row at a time into conversations.

All reading goes through `datasets` in streaming mode, so compressed files, globs, parquet, arrow and hub data sets come
from one library and no list of rows ever exists. JSON lines are read as text and parsed here, because only then does an
error know its line. A row that does not fit is set aside with its place (`Problems`); the source's rest is read on.
Cost: one pass, memory for one block of the file (10 MB of text, one row group of parquet).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.cache_source import FORMAT, read_cache
from teacher_cache.prompts.problems import THRESHOLD, Problem, Problems
from teacher_cache.prompts.prompt_files import HubDataset, LocalFiles, locate
from teacher_cache.prompts.prompt_formats import Conversation, group_text, parse_row, prompt_turns

__all__ = ["THRESHOLD", "Conversation", "Problem", "Problems", "group_text", "prompt_turns", "read_prompts"]

MAX_LINE_BYTES = 16 * 2**20
"""Longest line of a JSON lines file that is parsed."""


def read_prompts(sources: Sequence[PromptSource], problems: Problems) -> Iterator[Conversation]:
    """Yield every source's conversations in order; rows that do not fit go to `problems`.

    Raises:
        PromptError: a source is missing, is no readable file, or has no row at all.
    """
    for origin, source in enumerate(sources):
        rows_before = problems.rows_read
        yield from islice(_read_source(source, origin, problems), source.limit)
        if problems.rows_read == rows_before:
            raise PromptError(
                f"{source.path}: the data set has no row; expected at least one in the format `{source.format}`"
            )


def _read_source(source: PromptSource, origin: int, problems: Problems) -> Iterator[Conversation]:
    if source.format == FORMAT:
        for conversation in read_cache(source, origin):
            problems.rows_read += 1
            yield conversation
        return
    for path, line, row in _rows(source):
        problems.rows_read += 1
        try:
            if isinstance(row, str):
                row = _parse_json(row)
            messages, text, reference = parse_row(row, source.format)
        except ValueError as error:
            problems.add(path, line, str(error))
            continue
        yield Conversation(source.source, path, line, source.format, messages, text, reference, origin)


def _rows(source: PromptSource) -> Iterator[tuple[str, int, Any]]:
    """Yield (path, number from 1, row); a row of a JSON lines file is its text, not yet parsed."""
    place = locate(source)
    if isinstance(place, HubDataset):
        yield from _stream(source.path, place.path, split=source.split, revision=place.revision)
        return
    assert isinstance(place, LocalFiles)
    for path in place.paths:
        if place.kind == "text":
            for name, line, row in _stream(str(path), "text", path, encoding_errors="backslashreplace"):
                if row["text"].strip("\ufeff \t\r\n"):
                    yield name, line, row["text"]
        else:
            yield from _stream(str(path), place.kind, path)


def _stream(
    name: str, builder: str, file: Path | None = None, split: str = "train", **options: Any
) -> Iterator[tuple[str, int, Any]]:
    import datasets

    if file is not None:
        options["data_files"] = str(file).replace("[", "[[]")
    line = 0
    try:
        for line, row in enumerate(datasets.load_dataset(builder, split=split, streaming=True, **options), start=1):
            yield name, line, row
    except Exception as error:  # the library raises whatever its readers raise; all of it means unreadable
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PromptError(f"{name}:{line + 1}: cannot be read as {builder} from here on ({reason})") from error


def _parse_json(line: str) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has {len(line):,} characters; at most {MAX_LINE_BYTES:,} are read")
    try:
        return json.loads(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON at column {error.colno} ({error.msg}); expected one object per line"
        ) from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; expected one flat object per line") from error

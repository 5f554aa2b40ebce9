"""Prompts: files or hub data sets in five formats, or another cache, read one row at a time into conversations.

Which files, and what is in them: prompt_files.py and prompt_readers.py. Which columns: prompt_columns.py and
prompt_formats.py. A row that does not fit is set aside with its place (`Problems`); the source's rest is read on. What
was not read is noted there.
Cost: one pass, memory for one row (one row group of parquet).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from shared.text import strict_json
from teacher_cache.prompts.cache_source import read_cache
from teacher_cache.prompts.files.hub_rows import read_hub
from teacher_cache.prompts.files.prompt_files import HubDataset, locate
from teacher_cache.prompts.files.prompt_readers import read_file
from teacher_cache.prompts.formats.prompt_columns import Columns
from teacher_cache.prompts.formats.prompt_formats import Conversation, parse_row
from teacher_cache.prompts.problems import Problems


def read_prompts(sources: Sequence[PromptSource], problems: Problems) -> Iterator[Conversation]:
    """Yield every source's conversations in order; rows that do not fit go to `problems`.

    Raises:
        PromptError: a source is missing, is no readable file, or has no row at all.
    """
    for origin, source in enumerate(sources):
        rows_before = problems.rows_read
        columns = Columns(source, problems.unread.setdefault(source.source, Counter()))
        yield from islice(_read_source(source, origin, columns, problems), source.limit)
        if problems.rows_read == rows_before:
            raise PromptError(
                f"{source.path}: the data set has no row; expected at least one in the format `{source.format}`"
            )
        columns.check()
        problems.idle_names += columns.idle_names()


def _read_source(source: PromptSource, origin: int, columns: Columns, problems: Problems) -> Iterator[Conversation]:
    if source.of_cache:
        for conversation in read_cache(source, origin):
            problems.rows_read += 1
            yield conversation
        return
    for path, line, row in _rows(source, problems):
        problems.rows_read += 1
        try:
            if isinstance(row, ValueError):
                raise row
            if isinstance(row, str):
                row = _parse_json(row)
            messages, text, reference = parse_row(columns.of(row), source.format)
        except ValueError as error:
            problems.add(path, line, str(error))
            continue
        yield Conversation(source.source, path, line, source.format, messages, text, reference, origin)


def _rows(source: PromptSource, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """Yield (path, number from 1, row); a row of a JSON lines file is its text, not yet parsed, a ValueError is its
    problem.
    """
    place = locate(source)
    if isinstance(place, HubDataset):
        yield from read_hub(place.path, place.revision, source.split, source.config)
        return
    if place.note is not None:
        problems.unread_files.append(place.note)
    for path in place.paths:
        for line, row in read_file(path):
            yield str(path), line, row


def _parse_json(line: str) -> Any:
    try:
        return strict_json.loads(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON at column {error.colno} ({error.msg}); expected one object per line, as `jq -c . OLD > "
            "NEW.jsonl` writes those that take several"
        ) from error

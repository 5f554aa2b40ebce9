"""A row of a prompt file and the conversation that it becomes, whichever format it is in.

One file beside this one a format: all but `text` become a list of turns (prompt_turns.py). What belongs to the prompt
(`system`, `history`, `tools`) goes with the turns. A row that does not fit its format, or whose other columns would
change what it means, is a `ValueError` whose message is the reason; the reader adds the place.

Also here, because it must never depend on anything but the row: the text whose hash is the row's group (`group_text`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from shared.cache.groups import normalised
from shared.recipe.sections.prompts import COLUMNS
from shared.recipe.yaml_text import columns_text
from teacher_cache.prompts.formats.likely_format import likely_format, renamed
from teacher_cache.prompts.formats.other_columns import (
    PART_OF_THE_PROMPT,
    refuse_marks,
    refuse_parts_of_the_prompt,
    refuse_thoughts,
)
from teacher_cache.prompts.formats.prompt_turns import (
    IS_IT_RIGHT,
    Message,
    kind_name,
    missing,
    texts_in,
)
from teacher_cache.prompts.formats.row_parts import RowFormat

REFERENCE_KEYS = ("reference", "answer")
NO_ANSWER = "the row has no answer; give one or add a `generate` section to the recipe"


@dataclass(frozen=True, slots=True)
class GivenSequence:
    """A row of another cache: an answered prompt that is tokens already."""

    prompt: str
    """Its text."""
    group_key: bytes
    token_ids: list[int]
    spans: list[list[int]]
    response: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a prompt source: `messages`, `text` or `sequence`."""

    source: str
    """The source's label in the recipe."""
    path: str
    """File or hub data set, as the recipe spells it."""
    line: int
    """Line or row in it, from 1."""
    format: str
    messages: list[Message] | None
    text: str | None
    reference: str | None
    """What a correct answer is checked against, where the row says."""
    origin: int = 0
    """Index of its entry under `prompts` in the recipe: its template settings."""
    sequence: GivenSequence | None = None

    @property
    def place(self) -> str:
        """Return `path:line`."""
        return f"{self.path}:{self.line}"


def parse_row(row: Any, format_name: str) -> tuple[list[Message] | None, str | None, str | None]:
    """Turn one decoded row into (messages, text, reference).

    Raises:
        ValueError: the row does not fit the format; the message says what was found and expected.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {kind_name(row)} but must be an object with named fields")
    try:
        return _parsed(row, format_name)
    except ValueError as error:
        if str(error).endswith(IS_IT_RIGHT):
            raise ValueError(f"{error} {_advice(row)}") from error
        raise


def _parsed(row: Mapping[str, Any], format_name: str) -> tuple[list[Message] | None, str | None, str | None]:
    """Turn a row into what `parse_row` returns."""
    reads, row_format = COLUMNS[format_name], _row_format(format_name)
    if reads[0] not in row and not (format_name == "messages" and "chosen" in row):
        raise ValueError(missing(row, reads[0]))
    if row_format.is_conversation:
        refuse_parts_of_the_prompt(
            row, format_name, reads, lambda columns: _parsed(_with_columns(row, format_name, columns), format_name)
        )
        refuse_marks(row)
    parsed = row_format.parse(row)
    messages, text = (None, parsed) if isinstance(parsed, str) else (parsed, None)
    if messages is not None:
        refuse_thoughts(row, messages, reads)
    reference = next((row[key] for key in REFERENCE_KEYS if row.get(key) is not None), None)
    if reference is not None and not isinstance(reference, str):
        reference = json.dumps(reference, ensure_ascii=False, sort_keys=True, default=str)
    for value in texts_in([text, reference, *(messages or ())]):
        _require_unicode(value)
    return messages, text, reference


def _with_columns(row: Mapping[str, Any], format_name: str, columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with these columns, without others that belong to a prompt and are not read."""
    reads = COLUMNS[format_name]
    kept = {
        name: value
        for name, value in row.items()
        if name in reads or name in columns.values() or name not in PART_OF_THE_PROMPT
    }
    return renamed(kept, format_name, columns)


def _advice(row: Mapping[str, Any]) -> str:
    """Say what reads a row that the recipe's format does not: a format and columns that were tried on it."""
    found = likely_format(row)
    if found is not None:
        name, columns = found
        with contextlib.suppress(ValueError):
            _parsed(renamed(row, name, columns), name)
            return f"`format: {name}`{f' with `columns: {columns_text(columns)}`' if columns else ''} reads it"
    return (
        "`columns` names what it reads: {prompt: question, response: answer} for prompt_completion, say (docs/data.md)"
    )


@cache
def _row_format(name: str) -> RowFormat:
    found: RowFormat = import_module(f"{__package__}.{name}").FORMAT
    return found


def prompt_turns(messages: list[Message] | None) -> list[Message]:
    """Return the turns up to and with the last that is not the assistant's: what an answer is asked for.

    Raises:
        ValueError: there is no user turn, or the row is a plain text.
    """
    if messages is None:
        raise ValueError("`format: text` has no prompt to answer; leave `generate` out or change the format")
    last = max((index for index, message in enumerate(messages) if message["role"] in ("user", "tool")), default=None)
    if last is None:
        raise ValueError("the conversation has no user turn, so there is nothing to answer; expected at least one")
    return messages[: last + 1]


def prompt_text(messages: list[Message] | None, text: str | None) -> str:
    """Return a row's prompt as text, which its row_key hashes and the cache shows.

    A prompt of one user turn is that turn's text, whichever format it came in. Any other conversation is its turns up
    to the last user turn, each as role, newline, content, joined by blank lines. `text` is the whole text. Nothing of
    the template, the recipe's system text, the tokenizer or the sampling enters.
    """
    if messages is None:
        assert text is not None
        return text
    turns = prompt_turns(messages)
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}\n{turn['content']}" for turn in turns)


def group_text(messages: list[Message] | None, text: str | None, rule: str = "first question") -> str:
    r"""Return the text whose hash says which rows belong together, by the cache's rule (shared/cache/groups.py).

    >>> ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two  and two? "}]
    >>> group_text(ask, None), group_text(ask, None, "prompt")
    ('Two and two?', 'system\nBe brief.\n\nuser\nTwo  and two? ')
    """
    if rule == "prompt":
        return prompt_text(messages, text)
    if messages is None:
        assert text is not None
        return normalised(text)
    asked = prompt_turns(messages)
    return normalised(next((turn for turn in asked if turn["role"] == "user"), asked[-1])["content"])


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at character {error.start} and is not valid Unicode"
        ) from error

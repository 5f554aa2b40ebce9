"""`conversations`: a list of turns with `from` and `value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.prompts.formats.prompt_turns import SHAREGPT_ROLES, Message, is_empty, parse_turns
from teacher_cache.prompts.formats.row_parts import RowFormat, list_in, with_context


def parse(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row."""
    turns = list(list_in(row, "conversations"))
    if not is_empty(row.get("chosen")):  # a preference pair: the better answer to the conversation
        turns.append(row["chosen"])
    return with_context(row, parse_turns(turns, "conversations", "from", "value", SHAREGPT_ROLES))


FORMAT = RowFormat(parse)

"""`messages`: a list of turns with `role` and `content`; or a preference pair, of which `chosen` is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.prompts.formats.prompt_turns import Message
from teacher_cache.prompts.formats.row_parts import RowFormat, list_in, prompt_and_answer, turns_of, with_context


def parse(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row."""
    if "messages" in row or "chosen" not in row:
        return with_context(row, turns_of(list_in(row, "messages"), "messages"))
    return with_context(row, prompt_and_answer(row.get("prompt"), "prompt", row["chosen"], "chosen"))


FORMAT = RowFormat(parse)

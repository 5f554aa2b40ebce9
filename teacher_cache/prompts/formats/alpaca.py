"""`instruction`, an `input` that belongs to it, and `output` (or `chosen`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.prompts.formats.prompt_turns import Message, is_empty
from teacher_cache.prompts.formats.row_parts import (
    RowFormat,
    optional_text_in,
    prompt_and_answer,
    text_in,
    with_context,
)


def parse(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row."""
    instruction, given = text_in(row, "instruction"), optional_text_in(row, "input")
    prompt = f"{instruction}\n\n{given}" if given else instruction
    name = "chosen" if is_empty(row.get("output")) and "chosen" in row else "output"
    return with_context(row, prompt_and_answer(prompt, "instruction", row.get(name), name))


FORMAT = RowFormat(parse)

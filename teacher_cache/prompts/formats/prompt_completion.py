"""`prompt` and `completion` (or `chosen`), each a text or a list of turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.prompts.formats.prompt_turns import Message, is_empty
from teacher_cache.prompts.formats.row_parts import RowFormat, prompt_and_answer, text_in, with_context


def parse(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row."""
    name = "chosen" if is_empty(row.get("completion")) and "chosen" in row else "completion"
    prompt = row["prompt"] if isinstance(row.get("prompt"), list) else text_in(row, "prompt")
    return with_context(row, prompt_and_answer(prompt, "prompt", row.get(name), name))


FORMAT = RowFormat(parse)

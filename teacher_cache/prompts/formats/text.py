"""`text`: plain text, which is trained as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.prompts.formats.row_parts import RowFormat, text_in


def parse(row: Mapping[str, Any]) -> str:
    """Return the text."""
    return text_in(row, "text")


FORMAT = RowFormat(parse, is_conversation=False)

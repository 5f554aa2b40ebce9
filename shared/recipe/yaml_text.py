"""A text as a YAML scalar: plain where that is safe, in double quotes elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping


def yaml_text(text: str) -> str:
    """Write a text as a YAML scalar of one line, whatever is in it.

    >>> yaml_text("answer"), yaml_text("Question ")
    ('answer', '"Question "')
    """
    plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) and text.lower() not in ("true", "false", "null")
    return text if plain else '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    """Write a character within double quotes of YAML."""
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def columns_text(columns: Mapping[str, str]) -> str:
    """Write `columns` of a source of prompts in one line of YAML.

    >>> columns_text({"prompt": "Question ", "response": "answer"})
    '{prompt: "Question ", response: answer}'
    """
    return "{" + ", ".join(f"{name}: {yaml_text(column)}" for name, column in columns.items()) + "}"

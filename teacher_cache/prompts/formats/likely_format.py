"""Which format reads a row of a stranger's file, by the names of its columns: for a starter and a refusal.

A column is a question or an answer where its name is one that data sets use, upper case and white space aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.recipe.sections.prompts import ALIASES, COLUMNS
from shared.text import strict_json
from teacher_cache.prompts.formats.prompt_turns import is_empty

_QUESTIONS = ("prompt", "question", "query", "problem", "instruction", "input", "inputs", "user")
_ANSWERS = ("completion", "response", "answer", "output", "solution", "reply", "assistant", "target", "targets")
_ANSWER_OF = {"prompt_completion": "completion", "alpaca": "output"}
"""Format to its column of answers."""


def likely_format(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Return a format that reads a row and the `columns` that it needs; None where no column's name or turns tell.

    >>> likely_format({"Question ": "1 + 1?", "answer": "2", "system_prompt": "Add."})
    ('prompt_completion', {'prompt': 'Question ', 'response': 'answer', 'system': 'system_prompt'})
    >>> likely_format({"instruction": "Add.", "context": "1, 1", "response": "2"})
    ('alpaca', {'response': 'response', 'input': 'context'})
    >>> likely_format({"conversations": [{"role": "user", "content": "Hi"}]})
    ('messages', {'messages': 'conversations'})
    >>> likely_format({"talk": '[{"from": "human", "value": "Hi"}]'})
    ('sharegpt', {'conversations': 'talk'})
    """
    found = _by_turns(row) or _by_names(row)
    if found is None or found[0] == "text":
        return found
    name, columns = found
    if name == "alpaca" and "input" not in row and isinstance(row.get("context"), str):
        columns |= {"input": "context"}
    if "system" not in row and isinstance(row.get("system_prompt"), str):
        columns |= {"system": "system_prompt"}
    return name, columns


def _by_turns(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Tell by the keys of the turns in the only column that holds some; names tell what several columns are."""
    formats = {("role", "content"): "messages", ("from", "value"): "sharegpt"}
    found = [
        (format_name, str(column))
        for column, value in ((column, _as_list(value)) for column, value in row.items())
        if value and isinstance(value[0], Mapping)
        for keys, format_name in formats.items()
        if all(key in value[0] for key in keys)
    ]
    if len(found) != 1 or found[0][1] in ("prompt", "completion", "chosen", "rejected", "output"):
        return None
    name, column = found[0]
    return name, {} if column == COLUMNS[name][0] else {COLUMNS[name][0]: column}


def _as_list(value: Any) -> list[Any]:
    """Return a list, or the list whose JSON a table holds; nothing of anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = strict_json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _by_names(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    for name, columns in COLUMNS.items():
        if columns and (columns[0] in row or (name == "messages" and "chosen" in row and "prompt" not in row)):
            answer = _answer_of(row, name)
            return name, {"response": answer} if answer else {}
    question = _named(row, _QUESTIONS)
    if question is None:
        return None
    answer = _named(row, _ANSWERS)
    return "prompt_completion", {"prompt": question, **({"response": answer} if answer else {})}


def _answer_of(row: Mapping[str, Any], format_name: str) -> str | None:
    """Return the column that holds what a format looks for under another name."""
    wanted = _ANSWER_OF.get(format_name)
    return None if wanted is None or wanted in row or "chosen" in row else _named(row, _ANSWERS)


def _named(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the text column of the first of these names."""
    columns = {str(column).strip().lower(): str(column) for column, value in row.items() if isinstance(value, str)}
    return next((columns[name] for name in names if name in columns and not is_empty(row[columns[name]])), None)


def renamed(row: Mapping[str, Any], format_name: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row whose columns have the names that a format reads."""
    aliases = ALIASES.get(format_name, {})
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return {**others, **{aliases.get(name, name): row[column] for name, column in columns.items()}}

"""Five row formats, one conversation: what a row of a prompt file may look like and what it becomes.

`messages`, `sharegpt`, `alpaca` and `prompt_completion` become a list of turns; `text` stays text. A row that does not
fit its format is a `ValueError` whose message is the reason; the reader adds the place.

Also here, because it must never depend on anything but the row: the text whose hash is the row's group (`group_text`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.cache.groups import normalised

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
REFERENCE_KEYS = ("reference", "answer")
MAX_MESSAGES = 1024
"""Turns of one conversation; more is taken for a mistake."""


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
        raise ValueError(f"the row is {_kind(row)} but must be an object with named fields")
    messages, text = _PARSERS[format_name](row)
    reference = next((row[key] for key in REFERENCE_KEYS if row.get(key) is not None), None)
    if reference is not None and not isinstance(reference, str):
        reference = json.dumps(reference, ensure_ascii=False, sort_keys=True, default=str)
    for value in (text, reference, *(value for message in messages or () for value in message.values())):
        if value is not None:
            _require_unicode(value)
    return messages, text, reference


def prompt_turns(messages: list[Message]) -> list[Message]:
    """Return the turns up to and with the last that is not the assistant's: what an answer is asked for.

    Raises:
        ValueError: there is no user turn.
    """
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
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}\n{turn['content']}" for turn in turns)


def group_text(messages: list[Message] | None, text: str | None, rule: str = "first question") -> str:
    r"""Return the text whose hash says which rows belong together, by the cache's rule (shared/groups.py).

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


def _parse_messages(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    turns = _field(row, "messages", list)
    return _turns(turns, "messages", "role", "content", {role: role for role in ROLES}), None


def _parse_sharegpt(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    turns = _field(row, "conversations", list)
    return _turns(turns, "conversations", "from", "value", SHAREGPT_ROLES), None


def _parse_prompt_completion(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    return _pair(_text(row, "prompt"), _optional_text(row, "completion")), None


def _parse_alpaca(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    instruction, given = _text(row, "instruction"), _optional_text(row, "input")
    return _pair(f"{instruction}\n\n{given}" if given else instruction, _optional_text(row, "output")), None


def _parse_text(row: Mapping[str, Any]) -> tuple[None, str]:
    return None, _text(row, "text")


_PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[list[Message] | None, str | None]]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
}


def _pair(prompt: str, answer: str | None) -> list[Message]:
    turns = [{"role": "user", "content": prompt}]
    return [*turns, {"role": "assistant", "content": answer}] if answer else turns


def _turns(turns: list[Any], name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    if not turns:
        raise ValueError(f"{name!r} is empty; expected at least one turn")
    if len(turns) > MAX_MESSAGES:
        raise ValueError(f"{name!r} has {len(turns):,} turns; at most {MAX_MESSAGES:,} are read")
    parsed = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where} is {_kind(turn)} but must be an object with {role_key!r} and {text_key!r}")
        if turn.get("tool_calls"):
            raise ValueError(f"{where} has tool calls, which are not supported; write them into {text_key!r}")
        role = _field(turn, role_key, str, where)
        if role not in roles:
            raise ValueError(f"{where} has the unknown role {role!r}; expected one of {', '.join(roles)}")
        message = {"role": roles[role], "content": _field(turn, text_key, str, where)}
        if roles[role] in ("user", "assistant") and not message["content"].strip():
            raise ValueError(f"{where} is an empty {roles[role]} turn; expected text")
        if isinstance(turn.get("reasoning_content"), str):
            message["reasoning_content"] = turn["reasoning_content"]
        parsed.append(message)
    return parsed


def _field(row: Mapping[str, Any], key: str, kind: type, where: str = "the row") -> Any:
    if key not in row:
        found = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
        raise ValueError(f"{where} has no {key!r} (found {found}); is `format` right?")
    value = row[key]
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} of {where} is {_kind(value)} but must be {_NAMES[kind]}")
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    value: str = _field(row, key, str)
    if not value.strip():
        raise ValueError(f"{key!r} is empty; expected text")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} of the row is {_kind(value)} but must be text")
    return value if value and value.strip() else None


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at character {error.start} and is not valid Unicode"
        ) from error


_NAMES: dict[type, str] = {str: "text", list: "a list"}


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"of type {type(value).__name__}")

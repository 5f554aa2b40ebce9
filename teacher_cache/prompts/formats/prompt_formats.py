"""Five row formats, one conversation: what a row of a prompt file may look like and what it becomes.

`messages`, `sharegpt`, `alpaca` and `prompt_completion` become a list of turns (prompt_turns.py); `text` stays text.
What belongs to the prompt (`system`, `history`, `tools`) goes with the turns. A row that does not fit its format, or
whose other columns would change what it means, is a `ValueError` whose message is the reason; the reader adds the
place.

Also here, because it must never depend on anything but the row: the text whose hash is the row's group (`group_text`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.cache.groups import normalised
from shared.recipe.prompts import COLUMNS
from teacher_cache.prompts.formats.prompt_turns import (
    ROLES,
    SHAREGPT_ROLES,
    Message,
    field_of,
    is_empty,
    kind_name,
    parse_turns,
    texts_in,
    tools_turn,
)

REFERENCE_KEYS = ("reference", "answer")
PART_OF_THE_PROMPT = (
    "system",
    "system_prompt",
    "history",
    "tools",
    "functions",
    "function_call",
    "tool_calls",
    "documents",
    "context",
    "input",
    "images",
    "image",
    "videos",
    "audios",
    "audio",
    "chat_template_kwargs",
)
"""Columns that change what a row asks for; a format that does not read one refuses a row that has it."""


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
    reads = COLUMNS[format_name]
    for name in PART_OF_THE_PROMPT if format_name != "text" else ():
        if name not in reads and not is_empty(row.get(name)):
            raise ValueError(
                f"the column {name!r} is part of the prompt and `format: {format_name}` does not read it; name it in "
                "`columns` "
                f"for one of {', '.join(reads)}, or leave it out knowingly with `ignore: [{name}]`"
            )
    if row.get("label") is False and format_name != "text":
        raise ValueError("'label' is false, which marks an answer that is not to be learnt; remove the row")
    messages, text = _PARSERS[format_name](row)
    reference = next((row[key] for key in REFERENCE_KEYS if row.get(key) is not None), None)
    if reference is not None and not isinstance(reference, str):
        reference = json.dumps(reference, ensure_ascii=False, sort_keys=True, default=str)
    for value in texts_in([text, reference, *(messages or ())]):
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


def _parse_messages(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    if "messages" in row or "chosen" not in row:
        return _with_context(row, _turns_of(_list(row, "messages"), "messages")), None
    return _with_context(row, _prompt_and_answer(row.get("prompt"), "prompt", row["chosen"], "chosen")), None


def _parse_sharegpt(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    turns = list(_list(row, "conversations"))
    if not is_empty(row.get("chosen")):  # a preference pair: the better answer to the conversation
        turns.append(row["chosen"])
    return _with_context(row, parse_turns(turns, "conversations", "from", "value", SHAREGPT_ROLES)), None


def _parse_prompt_completion(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    name = "chosen" if is_empty(row.get("completion")) and "chosen" in row else "completion"
    prompt = row["prompt"] if isinstance(row.get("prompt"), list) else _text(row, "prompt")
    return _with_context(row, _prompt_and_answer(prompt, "prompt", row.get(name), name)), None


def _parse_alpaca(row: Mapping[str, Any]) -> tuple[list[Message], None]:
    instruction, given = _text(row, "instruction"), _optional_text(row, "input")
    prompt = f"{instruction}\n\n{given}" if given else instruction
    name = "chosen" if is_empty(row.get("output")) and "chosen" in row else "output"
    return _with_context(row, _prompt_and_answer(prompt, "instruction", row.get(name), name)), None


def _parse_text(row: Mapping[str, Any]) -> tuple[None, str]:
    return None, _text(row, "text")


_PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[list[Message] | None, str | None]]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
}


def _prompt_and_answer(prompt: Any, prompt_name: str, answer: Any, answer_name: str) -> list[Message]:
    """Join a prompt and its answer, each text or turns; an answer that repeats the prompt's turns stands for both."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else []
    if isinstance(prompt, list):
        asked = _turns_of(prompt, prompt_name)
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{prompt_name!r} of the row is {kind_name(prompt)} but must be text")
    if isinstance(answer, list) and answer:
        if not isinstance(answer[0], Mapping):
            raise ValueError(f"{answer_name!r} of the row is a list but must be text or a list of turns")
        answered = _turns_of(answer, answer_name)
        return answered if any(turn["role"] == "user" for turn in answered) else [*asked, *answered]
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{answer_name!r} of the row is {kind_name(answer)} but must be text")
    return [*asked, {"role": "assistant", "content": answer}] if answer and answer.strip() else asked


def _with_context(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put what columns say of the prompt before the turns: tools, system text, earlier questions and answers."""
    before: list[Message] = []
    system = _optional_text(row, "system")
    if system is not None and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system.strip():
            raise ValueError("the row has a column 'system' and a system turn that differ; keep one")
        system = None
    if system is not None:
        before.append({"role": "system", "content": system})
    for number, pair in enumerate(_list(row, "history") if not is_empty(row.get("history")) else ()):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise ValueError(f"history[{number}] must be a question and its answer, both text")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if len(before) > 1 and turns[0]["role"] == "system":
        raise ValueError(
            "the row has a column 'history' and a system turn after it; put the system text into a column 'system'"
        )
    return [*(tools_turn(row["tools"]) if not is_empty(row.get("tools")) else []), *before, *turns]


def _turns_of(turns: list[Any], name: str) -> list[Message]:
    return parse_turns(turns, name, "role", "content", ROLES)


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list, which tables of text hold as JSON."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            row = {**row, name: json.loads(value)}
        except (ValueError, RecursionError):
            raise ValueError(f"{name!r} of the row is text but no JSON list") from None
    found: list[Any] = field_of(row, name, list)
    return found


def _text(row: Mapping[str, Any], key: str) -> str:
    value: str = field_of(row, key, str)
    if not value.strip():
        raise ValueError(f"{key!r} is empty; expected text")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} of the row is {kind_name(value)} but must be text")
    return value if value and value.strip() else None


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at character {error.start} and is not valid Unicode"
        ) from error

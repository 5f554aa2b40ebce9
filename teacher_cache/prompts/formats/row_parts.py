"""What row formats have in common: a column of a kind, an answer after its prompt, what goes before the turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.cache.groups import normalised
from shared.text import strict_json
from teacher_cache.prompts.formats.prompt_turns import (
    ROLES,
    Message,
    field_of,
    is_empty,
    kind_name,
    parse_turns,
    tools_turn,
)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One shape of rows: `FORMAT` of a module of this package that is named after it."""

    parse: Callable[[Mapping[str, Any]], list[Message] | str]
    """Turns, or a plain text, of a row; ValueError with the reason where it does not fit."""
    is_conversation: bool = True
    """Whether columns such as `system` or `tools`, which it may not read, would change what a row asks for."""


def prompt_and_answer(prompt: Any, prompt_name: str, answer: Any, answer_name: str) -> list[Message]:
    """Join a prompt and its answer, each text or turns; an answer that repeats the prompt's turns stands for both.

    Raises:
        ValueError: one is neither, or the answer begins with a question that is not the prompt's.
    """
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else []
    if isinstance(prompt, list):
        asked = turns_of(prompt, prompt_name)
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{prompt_name!r} of the row is {kind_name(prompt)} but must be text")
    if isinstance(answer, list) and answer:
        if not isinstance(answer[0], Mapping):
            raise ValueError(f"{answer_name!r} of the row is a list but must be text or a list of turns")
        answered = turns_of(answer, answer_name)
        if answered[0]["role"] not in ("system", "user") or all(turn["role"] != "user" for turn in answered):
            return [*asked, *answered]
        if asked and not _begins_with(answered, asked):
            raise ValueError(
                f"{answer_name!r} begins with a question and does not repeat the turns of {prompt_name!r}, which would "
                "be lost; let it repeat all of them, or none"
            )
        return answered
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{answer_name!r} of the row is {kind_name(answer)} but must be text")
    return [*asked, {"role": "assistant", "content": answer}] if answer and answer.strip() else asked


def _begins_with(turns: list[Message], asked: list[Message]) -> bool:
    """Tell whether turns repeat a prompt's, white space in texts aside, a system turn before them allowed.

    >>> _begins_with([{"role": "user", "content": "Hi "}], [{"role": "user", "content": "Hi"}])
    True
    """
    first = int(turns[0]["role"] == "system" and asked[0]["role"] != "system")
    return [_plain(turn) for turn in turns[first : first + len(asked)]] == [_plain(turn) for turn in asked]


def _plain(turn: Message) -> Message:
    return {**turn, "content": normalised(turn["content"])}


def with_context(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put what columns say of the prompt before the turns: tools, system text, earlier questions and answers."""
    before: list[Message] = []
    system = optional_text_in(row, "system")
    if system is not None and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system.strip():
            raise ValueError("the row has a column 'system' and a system turn that differ; keep one")
        system = None
    if system is not None:
        before.append({"role": "system", "content": system})
    for number, pair in enumerate(list_in(row, "history") if not is_empty(row.get("history")) else ()):
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


def turns_of(turns: list[Any], name: str) -> list[Message]:
    """Return turns of `role` and `content`."""
    return parse_turns(turns, name, "role", "content", ROLES)


def list_in(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a column that is a list, which tables of text hold as JSON."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            row = {**row, name: strict_json.loads(value)}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name!r} of the row is text but no JSON list ({error})") from None
    found: list[Any] = field_of(row, name, list)
    return found


def text_in(row: Mapping[str, Any], key: str) -> str:
    """Return a column that is a text and not empty."""
    value: str = field_of(row, key, str)
    if not value.strip():
        raise ValueError(f"{key!r} is empty; expected text")
    return value


def optional_text_in(row: Mapping[str, Any], key: str) -> str | None:
    """Return a column that is a text; None where there is nothing in it."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} of the row is {kind_name(value)} but must be text")
    return value if value and value.strip() else None

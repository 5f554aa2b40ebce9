"""Is what a row says in what was made of it? White space aside, every text of the row must stand in the rendering.

A template may put a text anywhere and write around it; it may escape it as JSON; it may split an answer at its <think>
tags. What it leaves out would be lost without a trace, so the first text that is missing is named. Of earlier answers
only the text after their thoughts, who speaks and the names of tools called are looked for, since templates drop
earlier thoughts on purpose.
Cost: linear in the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from teacher_cache.prompts.formats.prompt_turns import THOUGHTS, Message

Missing = tuple[str, str]
"""What is missing, in words, and its text."""


def squeezed(text: str) -> str:
    """Return text without white space: 'a b ' -> 'ab'."""
    return "".join(text.split())


def missing_of_answer(message: Message, rendered: str, tokenized: Callable[[str], str] = str) -> Missing | None:
    """Return what of an answer (text, thoughts, tool calls) is not in its rendering, or None.

    Args:
        message: the answer.
        rendered: its rendering, with or without white space.
        tokenized: what a tokenizer's normalisation makes of a text, for tokenizers that change letters.
    """
    place = squeezed(rendered)
    for what, text in _of_answer(message):
        parts = [text] if not what.startswith("the answer") else [text, *re.split(r"</?think>", text)]
        found = [_is_in(part, place) or _is_in(tokenized(part), place) for part in parts]
        if not (found[0] or (len(found) > 2 and all(found[1:]))):
            return what, text
    return None


def missing_of_prompt(messages: list[Message], rendered: str) -> Missing | None:
    """Return what of the turns before an answer, tools included, is not in their rendering, or None."""
    place = squeezed(rendered)
    for message in messages:
        for what, text in _of_context(message):
            if not _is_in(text, place):
                return what, text
    return None


def _of_answer(message: Message) -> Iterator[Missing]:
    yield "the answer's text", message["content"]
    for key in THOUGHTS:
        if key in message:
            yield f"the answer's thoughts in {key!r}", message[key]
    for call in message.get("tool_calls", ()):
        yield "the name of a tool call", call["function"]["name"]
        for text in _leaves(call["function"]["arguments"]):
            yield "an argument of a tool call", text


def _of_context(message: Message) -> Iterator[Missing]:
    role, content = message["role"], message["content"]
    if "name" in message and role != "tool":  # who speaks; of a tool's answer templates drop it, since the call has it
        yield f"the name of the {role} turn's speaker", message["name"]
    if role == "tools":
        for tool in json.loads(content):
            inner = tool.get("function", tool)
            inner = inner if isinstance(inner, Mapping) else tool
            if isinstance(inner.get("name"), str):
                yield f"the tool {inner['name']!r} of the column 'tools'", inner["name"]
    elif role == "assistant":
        yield "an earlier answer's text", content.rpartition("</think>")[2]
        for call in message.get("tool_calls", ()):
            yield "the name of an earlier tool call", call["function"]["name"]
    else:
        yield f"the {role} turn's text", content


def _leaves(value: Any) -> Iterator[str]:
    """Yield keys and values of arguments as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _is_in(text: str, place: str) -> bool:
    """Tell whether a text stands in a place without white space: as it is, or as JSON or Python spell it."""
    if squeezed(text) in place:
        return True
    spelled = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    words = {"true": "True", "false": "False", "null": "None"}
    return any(squeezed(one[1:-1]) in place for one in spelled) or words.get(text, "\0") in place

"""Is what a row says in what was made of it? White space aside, every text of the row must stand in the rendering.

A template may put a text anywhere and write around it; it may escape it as JSON; it may split an answer at its <think>
tags. What it leaves out would be lost without a trace, so the first text that is missing is named. Of earlier answers
only the text after their thoughts, who speaks and the names of tools called are looked for, since templates drop
earlier thoughts on purpose.
Cost: a search of the rendering per text.
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


class _Rendering:
    """A rendering without white space, from which texts are taken, so that one within another needs its own place."""

    def __init__(self, rendered: str) -> None:
        self._rest = squeezed(rendered)

    def takes(self, text: str) -> bool:
        """Take one occurrence of a text; tell whether there was one."""
        for spelling in _spellings(text):
            if spelling in self._rest:
                self._rest = self._rest.replace(spelling, "\0", 1) if spelling else self._rest
                return True
        return False

    def has(self, text: str) -> bool:
        """Tell whether a text stands in what is left."""
        return any(spelling in self._rest for spelling in _spellings(text))


def missing_of_answer(message: Message, rendered: str, tokenized: Callable[[str], str] = str) -> Missing | None:
    """Return what of an answer (text, thoughts, tool calls) is not in its rendering, or None.

    Args:
        message: the answer.
        rendered: its rendering, with or without white space.
        tokenized: what a tokenizer's normalisation makes of a text, for tokenizers that change letters.
    """
    rendering = _Rendering(rendered)

    def is_taken(text: str) -> bool:
        return rendering.takes(text) or rendering.takes(tokenized(text))

    lost = list[Missing]()
    texts = [one for one in _of_answer(message) if one[0].startswith("the answer")]
    for what, text in sorted(texts, key=lambda one: len(one[1]), reverse=True):
        parts = re.split(r"</?think>", text) if what.endswith("text") else [text]
        if not (is_taken(text) or (len(parts) > 1 and all(map(is_taken, parts)))):
            lost.append((what, text))
    for one in _of_answer(message):
        if one in lost or not (one in texts or rendering.has(one[1]) or rendering.has(tokenized(one[1]))):
            return one
    return None


def missing_of_prompt(messages: list[Message], rendered: str) -> Missing | None:
    """Return what of the turns before an answer, tools included, is not in their rendering, or None.

    A turn's text needs a place of its own: of "Be brief." and "Say: be brief. Be brief." the first may be missing.
    """
    said = [(one, _is_turn(one[0])) for message in messages for one in _of_context(message)]
    rendering = _Rendering(rendered)
    turns = sorted((text for (_, text), is_turn in said if is_turn), key=len, reverse=True)
    lost = [text for text in turns if not rendering.takes(text)]
    whole = _Rendering(rendered)
    return next((one for one, is_turn in said if (one[1] in lost if is_turn else not whole.has(one[1]))), None)


def _is_turn(what: str) -> bool:
    return what.endswith("text")


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


def _spellings(text: str) -> Iterator[str]:
    """Yield a text without white space: as it is, and as JSON or Python spell it."""
    yield squeezed(text)
    for one in (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text)):
        yield squeezed(one[1:-1])
    words = {"true": "True", "false": "False", "null": "None"}
    if text in words:
        yield words[text]

"""What to do about a row that a template cannot render or split: advice that was tried on that row before it is given.

Each change below that somebody can make to the recipe or to the data is applied to the row in memory, alone and
together with `supervise: last`; the first with which the row renders is the advice. Changes that lose nothing come
first.
Cost: at most a few dozen renderings of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, combinations, product

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.formats.prompt_turns import THOUGHTS, Message

NOTHING_HELPS = "give a template that renders it in `chat_template`, or remove the row"
LAST = "set `supervise: last`, which trains a row's last answer and takes the turns before it as context"

SWITCHES = ("enable_thinking", "thinking")
"""Settings of templates that begin answers with thoughts, or leave them out."""

Change = tuple[str, PromptSource, list[Message]]
"""What to do, in words, and the settings and turns after it."""


def way_out(
    conversation: Conversation, source: PromptSource, attempt: Callable[[PromptSource, Conversation], object]
) -> str:
    """Return what to change so that `attempt` renders the conversation.

    Args:
        conversation: the row that is refused.
        source: its settings.
        attempt: renders a conversation with settings; raises PromptError where it cannot.
    """
    for words, settings, messages in _changes(conversation, source):
        for more in ([], [LAST] if source.supervise == "all" else []):
            advice = " and ".join([*more, *([words] if words else [])])
            if not advice:
                continue
            changed = settings.model_copy(update={"supervise": "last"}) if more else settings
            try:
                attempt(changed, replace(conversation, messages=messages))
            except PromptError:
                continue
            return advice
    return NOTHING_HELPS


def _changes(conversation: Conversation, source: PromptSource) -> Iterator[Change]:
    messages = conversation.messages or []
    yield "", source, messages
    thoughts = sorted({key for message in messages for key in THOUGHTS if key in message})
    for name in THOUGHTS if thoughts else ():
        if thoughts != [name]:
            yield (
                f"write the thoughts under the key {name!r}",
                source,
                [_renamed(message, name) for message in messages],
            )
    if thoughts:
        inline = [_inline(message) for message in messages]
        yield "write the thoughts into the text as <think>...</think>", source, inline
    for name, is_on in product(SWITCHES, (True, False) if thoughts else (False, True)):
        switched = source.chat_template_kwargs | {name: is_on}
        yield (
            f"set `{name}: {str(is_on).lower()}` in `chat_template_kwargs`",
            source.model_copy(update={"chat_template_kwargs": switched}),
            messages,
        )
    system = source.system or next((message["content"] for message in messages if message["role"] == "system"), None)
    if system is not None:
        yield (
            "put the system text into the first question",
            source.model_copy(update={"system": None}),
            _merged(messages, system),
        )
    if any(message["role"] == "developer" for message in messages):
        renamed = [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]
        yield "call the developer's turn 'system'", source, renamed
    tools = ["tools"] if any(message["role"] == "tools" for message in messages) else []
    names = ["name"] if any("name" in message for message in messages) else []
    kinds = [kind for kind in (tools, thoughts, names) if kind]
    for some in chain.from_iterable(combinations(kinds, size) for size in range(1, len(kinds) + 1)):
        ignored = [name for kind in some for name in kind]
        words = f"leave out what the template does not render with `ignore: [{', '.join(ignored)}]`"
        yield words, source, [_without(message, ignored) for message in messages if message["role"] not in ignored]


def _thoughts_of(message: Message) -> str:
    return "\n".join(message[key] for key in THOUGHTS if key in message)


def _without(message: Message, keys: list[str]) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def _renamed(message: Message, name: str) -> Message:
    thoughts = _thoughts_of(message)
    return {**_without(message, list(THOUGHTS)), name: thoughts} if thoughts else message


def _inline(message: Message) -> Message:
    thoughts = _thoughts_of(message)
    if not thoughts:
        return message
    return {**_without(message, list(THOUGHTS)), "content": f"<think>\n{thoughts}\n</think>\n\n{message['content']}"}


def _merged(messages: list[Message], system: str) -> list[Message]:
    """Put the system text before the first user turn's."""
    found = [message for message in messages if message["role"] != "system"]
    first = next((index for index, message in enumerate(found) if message["role"] == "user"), None)
    if first is not None:
        found[first] = {**found[first], "content": f"{system}\n\n{found[first]['content']}"}
    return found

"""The prompt of a request to an OpenAI-style server, as token ids: its messages rendered as the server rendered them.

Turns are read as those of prompts are (`format: messages`): text in parts is joined, arguments of tool calls become
objects. Tools and `chat_template_kwargs` go to the template. What else would change the prompt is refused: an answer to
a prompt that nobody sees here would be taught to another one. Cost: that of template and tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import CacheError, ModelError, reason_of
from shared.models.bounded_templates import render
from teacher_cache.prompts.formats.prompt_turns import ROLES, is_empty, parse_turns

_USUAL = {"add_generation_prompt": True, "continue_final_message": False}
"""What servers do where a request does not say otherwise."""
_CHANGE_PROMPT = ("chat_template", "documents", "functions", "reasoning_effort")


def rendered_messages(tokenizer: Any, where: str, request: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a request's messages.

    Raises:
        CacheError: the messages or a setting cannot be read, or the tokenizer's template cannot render them.
        ModelError: the template takes more time or memory than any does.
    """
    unread = [name for name in _CHANGE_PROMPT if not is_empty(request.get(name))]
    unread += [name for name, usual in _USUAL.items() if request.get(name) not in (None, usual)]
    if unread:
        raise CacheError(
            f"{where}: its request has `{unread[0]}`, which changes the prompt in a way that cannot be followed here; "
            "ask the server for the prompt's ids (vLLM: return_token_ids)"
        )
    settings, tools = request.get("chat_template_kwargs") or {}, request.get("tools")
    if not isinstance(settings, dict) or not all(isinstance(name, str) and name.isidentifier() for name in settings):
        raise CacheError(f"{where}: `chat_template_kwargs` of its request is no object of settings")
    if not is_empty(tools) and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise CacheError(f"{where}: `tools` of its request is no list of objects")
    try:
        turns = parse_turns(request["messages"], "messages", "role", "content", ROLES)
    except (ValueError, TypeError) as error:
        said = str(error).partition(", or leave it out knowingly")[0]
        raise CacheError(f"{where}: the messages of its request cannot be read ({said})") from None
    for turn in turns:
        turn.pop("train", None)
    more = {**settings, **({} if is_empty(tools) else {"tools": tools})}
    try:
        text = render(tokenizer, turns, "the tokenizer's chat template", **{**more, "add_generation_prompt": True})
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        raise CacheError(
            f"{where}: the tokenizer's chat template cannot render its messages ({reason_of(error, 200)})"
        ) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

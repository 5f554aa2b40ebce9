"""From the turns of a row to one kind of message: roles, text in parts, thoughts, tool calls, marks of what is not
trained.

A message has `role` and `content` (text), and where the row says them `reasoning_content`, `reasoning` or `thinking`
(thoughts, under the row's own name, since templates read one of them), `tool_calls` (arguments as objects), `name`,
`tool_call_id`, and `train: False` where the row marks an answer as context. Tools stand in a first message of their
own: role `tools`, content their JSON. Keys that are not understood are refused, so that nothing that a row says is
lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shared.text import strict_json

Message = dict[str, Any]

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "training", "loss", "loss_weight", "trainable")
"""Keys that say whether a turn is trained: 1 and true, or 0 and false."""
PASSED_ON = (*THOUGHTS, "name", "tool_call_id")
MAX_MESSAGES = 1024
"""Turns of one conversation; more is taken for a mistake."""


def parse_turns(turns: list[Any], name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    """Return messages of turns.

    Args:
        turns: as the row has them.
        name: their column, for errors.
        role_key: key of a turn's role.
        text_key: key of a turn's text.
        roles: the row's names of roles to ours.

    Raises:
        ValueError: a turn does not fit, or has a key that is not understood.

    >>> parse_turns([{"from": "gpt", "value": "4", "weight": 0}], "conversations", "from", "value", SHAREGPT_ROLES)
    [{'role': 'assistant', 'content': '4', 'train': False}]
    """
    if not turns:
        raise ValueError(f"{name!r} is empty; expected at least one turn")
    if len(turns) > MAX_MESSAGES:
        raise ValueError(f"{name!r} has {len(turns):,} turns; at most {MAX_MESSAGES:,} are read")
    known = (role_key, text_key, *PASSED_ON, *MARKS, "tool_calls", "function_call")
    unknown = [key for turn in turns if isinstance(turn, Mapping) for key in _filled(turn) if key not in known]
    return [
        _parse_turn(turn, f"{name}[{number}]", role_key, text_key, roles, unknown) for number, turn in enumerate(turns)
    ]


def _filled(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if not is_empty(value)}


def _parse_turn(
    turn: Any, where: str, role_key: str, text_key: str, roles: Mapping[str, str], unknown: list[str]
) -> Message:
    """Turn one turn into a message; `unknown` are the keys of all turns that are not understood."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {kind_name(turn)} but must be an object with {role_key!r} and {text_key!r}")
    said = field_of(turn, role_key, str, where)
    if said not in roles:
        raise ValueError(f"{where} has the unknown role {said!r}; expected one of {', '.join(roles)}")
    role = roles[said]
    present = {key: value for key, value in _filled(turn).items() if key not in (role_key, text_key)}
    odd = next((key for key in present if key in unknown), None)
    if odd is not None:
        raise ValueError(
            f"{where} has the key {odd!r}, which is not understood; remove it, or leave it out knowingly with "
            f"`ignore: [{', '.join(dict.fromkeys(unknown))}]`"
        )
    calls = _tool_calls(present, where)
    if said == "function_call":
        calls, content = calls + _calls_in_text(turn.get(text_key), where), ""
    else:
        content = _content(turn, text_key, where, may_lack=bool(calls))
    message: Message = {"role": role, "content": content}
    for key in PASSED_ON:
        if key in present:
            message[key] = field_of(present, key, str, where)
    if calls:
        message["tool_calls"] = calls
    if not _trained(present, where, role):
        message["train"] = False
    _check(message, where)
    return message


def _check(message: Message, where: str) -> None:
    role = message["role"]
    if role in ("user", "assistant") and not message["content"].strip() and "tool_calls" not in message:
        raise ValueError(f"{where} is an empty {role} turn; expected text")
    for key in (*THOUGHTS, "tool_calls"):
        if key in message and role != "assistant":
            raise ValueError(f"{where} has {key!r} in a {role} turn; only an assistant turn can have them")


def _trained(present: Mapping[str, Any], where: str, role: str) -> bool:
    marks = {key: present[key] for key in MARKS if key in present}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"{where} has {key}: {value!r}; a turn is trained (1, true) or context (0, false), nothing between"
            )
        if role != "assistant" and value and "weight" not in key:
            raise ValueError(f"{where} asks to train a {role} turn; only assistant turns are trained")
    return role != "assistant" or all(marks.values())


def _content(turn: Mapping[str, Any], key: str, where: str, *, may_lack: bool) -> str:
    value = turn.get(key)
    if value is None and may_lack:
        return ""
    if not isinstance(value, list):
        return str(field_of(turn, key, str, where))
    texts = []
    for number, part in enumerate(value):
        place = f"{where}.{key}[{number}]"
        if isinstance(part, Mapping):
            named = {name for name, inner in part.items() if not is_empty(inner)} - {"type", "text"}
            if part.get("type") != "text" or named:
                what = part.get("type") if part.get("type") != "text" else ", ".join(sorted(named))
                raise ValueError(f"{place} is or has {what!r}; only parts of text ({{type: text, text: ...}}) are read")
            part = part.get("text")
        if not isinstance(part, str):
            raise ValueError(f"{place} is {kind_name(part)} but must be text")
        texts.append(part)
    return "".join(texts)


def _tool_calls(present: Mapping[str, Any], where: str) -> list[Any]:
    calls = (
        [_call(call, f"{where}.tool_calls") for call in field_of(present, "tool_calls", list, where)]
        if ("tool_calls" in present)
        else []
    )
    if "function_call" in present:
        calls.append(_call(present["function_call"], f"{where}.function_call"))
    return calls


def _calls_in_text(text: Any, where: str) -> list[Any]:
    """Return the calls that a `function_call` turn spells as JSON: one object with name and arguments, or several."""
    try:
        found = strict_json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    return [_call(call, f"{where} (a function_call turn, whose text must be JSON)") for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return one call as templates expect it, arguments as an object."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"{where} holds {kind_name(call)} that names no function; expected name and arguments")
    unknown = {*inner} - {"name", "arguments"} | (
        {*call} - {"function", "id", "type", "index"} if inner is not call else set()
    )
    unknown -= {key for key in unknown if is_empty(inner.get(key, call.get(key)))}
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(map(repr, sorted(unknown)))}, which is not understood; expected name and arguments"
        )
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            said = f"{where} has arguments of {inner['name']} that are no JSON ({error}); expected an object"
            raise ValueError(said) from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where} has arguments of {inner['name']} that are {kind_name(arguments)}; expected an object"
        )
    if inner is not call and call.get("type") not in (None, "function"):
        raise ValueError(f"{where} has the type {call['type']!r}; expected 'function'")
    found = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
    return (
        {"id": call["id"], **found} if inner is not call and isinstance(call.get("id"), str) and call["id"] else found
    )


def tools_turn(tools: Any) -> list[Message]:
    """Return the message that holds a row's tools, or nothing where it has none.

    Raises:
        ValueError: they are no list of objects, or JSON text of one.
    """
    if isinstance(tools, str):
        try:
            tools = strict_json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise ValueError(f"'tools' of the row is text but no JSON ({error}); expected a list of objects") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"'tools' of the row is {kind_name(tools)} but must be a list of objects")
    return [{"role": "tools", "content": json.dumps(tools, ensure_ascii=False)}] if tools else []


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def is_empty(value: Any) -> bool:
    """Tell whether a value says nothing: null, empty text, an empty list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


IS_IT_RIGHT = "is `format` right?"
"""How a refusal ends that may have another format as its cause."""


def missing(row: Mapping[str, Any], key: str, where: str = "the row") -> str:
    """Say that a field is not there, and which are."""
    found = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
    return f"{where} has no {key!r} (found {found}); {IS_IT_RIGHT}"


def field_of(row: Mapping[str, Any], key: str, kind: type, where: str = "the row") -> Any:
    """Return a field of the kind wanted.

    Raises:
        ValueError: it is missing or of another kind.
    """
    if key not in row:
        raise ValueError(missing(row, key, where))
    value = row[key]
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} of {where} is {kind_name(value)} but must be {_NAMES[kind]}")
    return value


_NAMES: dict[type, str] = {str: "text", list: "a list"}


def kind_name(value: Any) -> str:
    """Return the kind of a JSON value in words."""
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

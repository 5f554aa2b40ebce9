"""Columns that a format does not read although they change what its rows mean: parts of the prompt, thoughts of the
answer, marks of what is not to be learnt.

All of a row's are named at once, with `columns` that were tried on it. Cost: a few lookups per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from shared.recipe.yaml_text import columns_text
from teacher_cache.prompts.formats.prompt_turns import MARKS, THOUGHTS, Message, is_empty, texts_in

PART_OF_THE_PROMPT = {
    **dict.fromkeys(("system", "system_prompt", "system_message", "system_instruction"), "system"),
    **dict.fromkeys(("history", "chat_history", "conversation_history"), "history"),
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("input", "context"), "input"),
    **dict.fromkeys(("function_call", "tool_calls", "documents", "passage", "passages", "choices", "options")),
    **dict.fromkeys(("images", "image", "videos", "audios", "audio", "chat_template_kwargs")),
}
"""Columns that change what a row asks for, and the column of a format that takes such a one, if any does."""
_THOUGHTS = (*THOUGHTS, "thought", "thoughts", "chain_of_thought", "cot", "complex_cot")
MARKS_OF_ROWS = (*MARKS, "label", "kto_tag", "loss_mask", "train_mask", "train_on_turn")
"""Columns whose false or 0, alone or in a list with one for each turn, says that an answer is not to be learnt."""


def refuse_parts_of_the_prompt(
    row: Mapping[str, Any], format_name: str, reads: tuple[str, ...], attempt: Callable[[dict[str, str]], object]
) -> None:
    """Refuse a row with columns of the prompt that its format does not read.

    Args:
        row: its columns.
        format_name: the recipe's format.
        reads: the columns that the format reads.
        attempt: parses the row with `columns`, without what is left out; raises ValueError where it does not fit.

    Raises:
        ValueError: all of them are named.
    """
    unread = [name for name in PART_OF_THE_PROMPT if name not in reads and not is_empty(row.get(name))]
    if not unread:
        return
    taken = {PART_OF_THE_PROMPT[name]: name for name in reversed(unread) if PART_OF_THE_PROMPT[name] in reads}
    columns = {str(name): column for name, column in taken.items() if is_empty(row.get(str(name)))}
    rest = [name for name in unread if name not in columns.values()]
    way, it = "", "it" if len(unread) == 1 else "them"
    if columns:
        with suppress(ValueError):  # advice that does not fit the row is not given
            attempt(columns)
            ignored = f" with `ignore: [{', '.join(rest)}]`" if rest else ""
            way = f"read {it} with `columns: {columns_text(columns)}`{ignored}, or "
    which = ", ".join(map(repr, unread))
    are = f"column {which} is" if len(unread) == 1 else f"columns {which} are"
    raise ValueError(
        f"the {are} part of the prompt, which `format: {format_name}` does not read; {way}leave {it} out knowingly "
        f"with `ignore: [{', '.join(unread)}]`"
    )


def refuse_marks(row: Mapping[str, Any]) -> None:
    """Refuse a row that marks an answer as not to be learnt.

    Raises:
        ValueError: with the mark.
    """
    for name in MARKS_OF_ROWS:
        value = row.get(name)
        values, way = (
            (value, "mark its turns (`weight: 0`)") if isinstance(value, list) else ([value], "remove the row")
        )
        if any(_says_no(one, is_class=name == "label") for one in values):
            raise ValueError(
                f"{name!r} is {json.dumps(value, default=str)[:40]}, which marks an answer that is not to be learnt; "
                f"{way}, or write `ignore: [{name}]`"
            )


def _says_no(value: Any, *, is_class: bool) -> bool:
    """Tell whether a mark says no, also as the text that a table of texts makes of it; a class has the number 0, too.

    >>> [_says_no(value, is_class=False) for value in (False, 0, "False", "0.0", None, "low")]
    [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        value = {"false": False, "0": 0, "0.0": 0}.get(value.strip().lower())
    return value is False or (value == 0 and isinstance(value, int | float) and not is_class)


def refuse_thoughts(row: Mapping[str, Any], messages: list[Message], reads: tuple[str, ...]) -> None:
    """Refuse a row whose answer's thoughts stand in a column of their own and nowhere in its turns.

    A single word there is a setting (`reasoning: on`).

    Raises:
        ValueError: with the column.
    """
    if messages[-1]["role"] != "assistant":
        return
    said = ["".join(text.split()) for text in texts_in(messages)]
    for name, text in _thoughts_in(row, reads):
        if not any("".join(text.split()) in one for one in said):
            raise ValueError(
                f"the column {name!r} holds thoughts of the answer ({text[:40]!r}), which would not be learnt; write "
                f"them into the answer as <think>...</think>, or leave them out knowingly with `ignore: [{name}]`"
            )


def _thoughts_in(row: Mapping[str, Any], reads: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, str) and len(value.split()) > 1 and str(name).lower() in _THOUGHTS and name not in reads:
            yield str(name), value

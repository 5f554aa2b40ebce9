"""Rows with system text, tools, thoughts and several turns, through the templates of public model families.

Either what is supervised is what the row says, or the refusal says what to do, and doing that gives what the row says.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation, parse_row
from teacher_cache.prompts.templates.spans import Template
from tests.teacher_cache.family_templates import COMPLETE, FAMILIES, family_tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "count_disks", "parameters": {"type": "object", "properties": {"node": {"type": "string"}}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "count_disks", "arguments": {"node": 'seven "7"'}}}
SYSTEM = {"role": "system", "content": "You count things."}
ASK, AGAIN = ({"role": "user", "content": text} for text in ("How many disks?", "And apples?"))
SAY, MORE = ({"role": "assistant", "content": text} for text in ("There are seven disks.", "Nine apples."))
THINK, RETHINK = ({"reasoning_content": text} for text in ("node seven has them", "the basket holds nine"))
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '7 "disks"', "tool_call_id": "abcdefghi"}

ROWS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": [ASK, SAY]},
    "system": {"messages": [SYSTEM, ASK, SAY]},
    "two answers": {"messages": [ASK, SAY, AGAIN, MORE]},
    "system, two answers": {"messages": [SYSTEM, ASK, SAY, AGAIN, MORE]},
    "thoughts": {"messages": [ASK, {**SAY, **THINK}]},
    "thoughts in the text": {"messages": [ASK, {**SAY, "content": "<think>\nnode seven\n</think>\n\nSeven."}]},
    "thoughts, two answers": {"messages": [SYSTEM, ASK, {**SAY, **THINK}, AGAIN, {**MORE, **RETHINK}]},
    "tools": {"messages": [ASK, SAY], "tools": [TOOL]},
    "tool call": {"messages": [SYSTEM, ASK, CALLING, RESULT, SAY], "tools": [TOOL]},
    "tool call, thoughts": {"messages": [ASK, {**CALLING, **THINK}, RESULT, {**SAY, **RETHINK}], "tools": [TOOL]},
}


def template(tokenizer, **settings) -> Template:
    given = {"source": "s", "path": "f", "format": "messages", "date": "2026-01-31", **settings}
    return Template(tokenizer, PromptSource.model_validate(given))


def talk(row: dict[str, Any]) -> Conversation:
    return Conversation("s", "f", 1, "messages", *parse_row(row, "messages"))


THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
LAST = "set `supervise: last`, which trains a row's last answer and takes the turns before it as context"


def thought_of(turn: dict[str, Any]) -> str | None:
    return next((turn[key] for key in THOUGHT_KEYS if key in turn), None)


def without_thoughts(turn: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in THOUGHT_KEYS}


def follow(advice: str, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do what a refusal says, as a user would: return the row and the settings after it."""
    settings: dict[str, Any] = {}
    for part in advice.replace(LAST, "<last>").split(" and "):
        if part == "<last>":
            settings["supervise"] = "last"
        elif found := re.fullmatch(r"write the thoughts under the key '(\w+)'", part):
            row = {**row, "messages": [_renamed(turn, found[1]) for turn in row["messages"]]}
        elif part == "write the thoughts into the text as <think>...</think>":
            row = {**row, "messages": [_in_text(turn) for turn in row["messages"]]}
        elif found := re.search(r"with `ignore: \[([\w, ]+)\]`", part):
            ignored = found[1].split(", ")
            turns = [{key: value for key, value in turn.items() if key not in ignored} for turn in row["messages"]]
            row = {key: value for key, value in {**row, "messages": turns}.items() if key not in ignored}
        else:
            assert part == "give a template that renders it in `chat_template`, or remove the row"
            settings["chat_template"] = COMPLETE
    return row, settings


def _renamed(turn: dict[str, Any], key: str) -> dict[str, Any]:
    thought = thought_of(turn)
    return turn if thought is None else {**without_thoughts(turn), key: thought}


def _in_text(turn: dict[str, Any]) -> dict[str, Any]:
    thought = thought_of(turn)
    return (
        turn if thought is None else {**without_thoughts(turn), "content": f"<think>{thought}</think>{turn['content']}"}
    )


def assert_what_the_row_says(tokenizer, found, row: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare spans with the row's answers: each holds its answer's words, in their order."""
    ids, spans = found
    texts = [tokenizer.decode(ids[start:end].tolist()) for start, end in spans.tolist()]
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    answers = answers[-1:] if settings.get("supervise") == "last" else answers
    assert len(texts) == len(answers)
    for text, turn in zip(texts, answers, strict=True):
        words = [*(thought_of(turn) or "").split(), *re.sub("</?think>", " ", turn["content"]).split()]
        for call in turn.get("tool_calls", ()):
            words += [call["function"]["name"], json.dumps(call["function"]["arguments"]["node"])]
        place = 0
        for word in words:
            place = text.index(word, place) + len(word)
    whole = tokenizer.decode(ids.tolist())
    for turn in row["messages"]:
        if turn["role"] in ("system", "user"):
            assert turn["content"] in whole
    assert "tools" not in row or "count_disks" in whole


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Any]:
    return {
        name: family_tokenizer(tmp_path_factory.mktemp("family") / str(number), family)
        for number, (name, family) in enumerate(FAMILIES.items())
    }


@pytest.mark.parametrize("row_name", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_supervised_is_what_the_row_says_or_the_advice_works(tokenizers, family, row_name):
    tokenizer, row, settings = tokenizers[family], ROWS[row_name], {}
    try:
        found = template(tokenizer).complete(talk(row))
    except PromptError as error:
        row, settings = follow(str(error).rpartition("; ")[2], row)
        found = template(tokenizer, **settings).complete(talk(row))
    assert_what_the_row_says(tokenizer, found, row, settings)


@pytest.mark.parametrize(
    ("family", "row_name", "advice"),
    [
        ("qwen3", "two answers", LAST),
        ("qwen3", "thoughts, two answers", LAST),
        ("qwen2.5", "thoughts", "write the thoughts into the text as <think>...</think>"),
        ("gpt-oss", "thoughts", "write the thoughts under the key 'thinking'"),
        ("gpt-oss", "two answers", LAST),
        ("mistral", "system, two answers", LAST),
        ("gemma3", "tools", "leave out what the template does not render with `ignore: [tools]`"),
        ("r1", "thoughts", "leave out what the template does not render with `ignore: [reasoning_content]`"),
        ("r1-open", "one answer", "give a template that renders it in `chat_template`, or remove the row"),
    ],
)
def test_the_advice_is_the_least_change_that_works(tokenizers, family, row_name, advice):
    with pytest.raises(PromptError, match=re.escape(advice) + "$"):
        template(tokenizers[family]).complete(talk(ROWS[row_name]))


@pytest.mark.parametrize("family", ["phi4", "gemma3", "llama3", "qwen2.5"])
def test_plain_dialogues_of_most_families_need_no_setting(tokenizers, family):
    for name in ("one answer", "two answers", "system, two answers"):
        assert_what_the_row_says(
            tokenizers[family], template(tokenizers[family]).complete(talk(ROWS[name])), ROWS[name], {}
        )


@pytest.mark.parametrize("family", ["llama3", "gpt-oss"])
def test_families_that_write_the_date_are_refused_without_one_and_follow_the_advice(tokenizers, family):
    with pytest.raises(PromptError, match=r"name a date for all rows, such as `date: (\d{4}-\d\d-\d\d)`") as caught:
        template(tokenizers[family], date=None).require_date()
    date = re.search(r"`date: (\S+)`", str(caught.value))[1]
    ids, _ = template(tokenizers[family], date=date).complete(talk(ROWS["one answer"]))
    again, _ = template(tokenizers[family], date=date).complete(talk(ROWS["one answer"]))
    assert ids.tolist() == again.tolist()


def test_a_setting_of_the_template_may_stand_for_the_date(tokenizers):
    dated = template(tokenizers["llama3"], date=None, chat_template_kwargs={"date_string": "26 Jul 2024"})
    dated.require_date()
    ids, _ = dated.complete(talk(ROWS["one answer"]))
    assert "26 Jul 2024" in tokenizers["llama3"].decode(ids.tolist())


def test_every_family_asks_for_answers_that_are_to_be_generated(tokenizers):
    for family, tokenizer in tokenizers.items():
        for name in ("one answer", "system", "two answers", "thoughts, two answers"):
            turns = ROWS[name]["messages"][:-1]
            ids = template(tokenizer).prompt_ids(talk({"messages": turns}))
            assert turns[-1]["content"] in tokenizer.decode(ids), family

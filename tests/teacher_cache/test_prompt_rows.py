"""Rows of every format: what belongs to the prompt is part of it, and what is not understood is refused by its name."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import parse_row
from tests.teacher_cache.row_files import read

ASK, SAY = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def turns(row: dict, row_format: str = "messages") -> list[dict]:
    messages, _, _ = parse_row(row, row_format)
    assert messages is not None
    return messages


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def tools(*found: dict) -> dict:
    return {"role": "tools", "content": json.dumps(found)}


@pytest.mark.parametrize(
    ("row_format", "row", "expected"),
    [
        ("alpaca", {"instruction": "Two?", "output": "2", "system": "Be brief."}, [system("Be brief."), ASK, SAY]),
        ("prompt_completion", {"prompt": "Two?", "completion": "2", "system": ""}, [ASK, SAY]),
        (
            "alpaca",
            {"instruction": "Two?", "output": "2", "history": [["Hi", "Ho"]], "system": "S"},
            [system("S"), {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, ASK, SAY],
        ),
        ("messages", {"messages": [ASK, SAY], "tools": [TOOL]}, [tools(TOOL), ASK, SAY]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Two?"}], "tools": json.dumps([TOOL]), "system": "S"},
            [tools(TOOL), system("S"), ASK],
        ),
        ("messages", {"messages": [system("S"), ASK], "system": "S ", "tools": []}, [system("S"), ASK]),
        ("messages", {"chosen": [ASK, SAY], "rejected": [ASK, {"role": "assistant", "content": "3"}]}, [ASK, SAY]),
        ("messages", {"prompt": [ASK], "chosen": [SAY], "rejected": []}, [ASK, SAY]),
        ("messages", {"prompt": "Two?", "chosen": [ASK, SAY]}, [ASK, SAY]),
        ("messages", {"prompt": "Two?", "chosen": "2"}, [ASK, SAY]),
        ("messages", {"prompt": "Two?\n", "chosen": [system("S"), ASK, SAY]}, [system("S"), ASK, SAY]),
        (
            "prompt_completion",
            {"prompt": [system("S"), ASK], "completion": [SAY, ASK, SAY]},
            [system("S"), ASK, SAY, ASK, SAY],
        ),
        ("prompt_completion", {"prompt": [ASK], "completion": [SAY, ASK, SAY]}, [ASK, SAY, ASK, SAY]),
        ("prompt_completion", {"prompt": "Two?", "chosen": "2", "rejected": "3"}, [ASK, SAY]),
        ("prompt_completion", {"prompt": [ASK], "completion": [SAY]}, [ASK, SAY]),
        ("alpaca", {"instruction": "Two?", "input": "", "chosen": "2"}, [ASK, SAY]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Two?"}], "chosen": {"from": "gpt", "value": "2"}},
            [ASK, SAY],
        ),
        ("messages", {"messages": json.dumps([ASK, SAY])}, [ASK, SAY]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}]}
                ]
            },
            [ASK],
        ),
        (
            "messages",
            {"messages": [ASK, {**SAY, "weight": 1}, ASK, {**SAY, "weight": 0}]},
            [ASK, SAY, ASK, {**SAY, "train": False}],
        ),
        ("messages", {"messages": [{**ASK, "train": False}, {**SAY, "train": True}]}, [ASK, SAY]),
        (
            "messages",
            {"messages": [ASK, {**SAY, "reasoning": "hm", "name": None, "refusal": None}]},
            [ASK, {**SAY, "reasoning": "hm"}],
        ),
        (
            "messages",
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]}]},
            [ASK, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]}],
        ),
        (
            "messages",
            {"messages": [ASK, {**SAY, "function_call": {"name": "add", "arguments": '{"a": 1}'}}]},
            [ASK, {**SAY, "tool_calls": [CALL]}],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Two?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "2"},
                ]
            },
            [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, SAY],
        ),
    ],
)
def test_what_a_row_says_of_its_prompt_and_answers_is_kept(row_format, row, expected):
    assert turns(row, row_format) == expected


@pytest.mark.parametrize(
    ("row_format", "row", "reason"),
    [
        (
            "prompt_completion",
            {"prompt": "a", "completion": "b", "context": "c"},
            "column 'context' is part of the prompt",
        ),
        ("messages", {"messages": [ASK], "functions": [TOOL]}, r"column 'functions' .* `ignore: \[functions\]`"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}], "history": [["a", "b"]]}, "column 'history'"),
        ("messages", {"messages": [ASK], "images": ["x"]}, "column 'images'"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": False}, "'label' is false"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "weight": 0}, "'weight' is 0"),
        ("alpaca", {"instruction": "a", "output": "b", "train": False}, "'train' is false"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}], "loss_weight": 0.0}, "'loss_weight' is 0"),
        ("messages", {"messages": [system("A"), ASK], "system": "B"}, "a system turn that differ"),
        (
            "alpaca",
            {"instruction": "a", "history": [["only a question"]]},
            r"history\[0\] must be a question and its answer",
        ),
        ("messages", {"messages": [ASK], "tools": "no json"}, "'tools' of the row is text but no JSON"),
        ("messages", {"messages": [ASK], "tools": {"name": "f"}}, "'tools' of the row is an object but must be a list"),
        (
            "messages",
            {"messages": [{**SAY, "mood": "glad"}]},
            r"key 'mood', which is not understood; .* `ignore: \[mood\]`",
        ),
        ("messages", {"messages": [{**SAY, "weight": 0.5}]}, r"weight: 0.5; a turn is trained \(1, true\) or context"),
        ("messages", {"messages": [{**ASK, "train": True}]}, "asks to train a user turn"),
        ("messages", {"messages": [{**ASK, "reasoning": "hm"}]}, "'reasoning' in a user turn"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "is or has 'image_url'",
        ),
        ("messages", {"messages": [{"role": "user", "content": [3]}]}, r"content\[0\] is a number but must be text"),
        ("messages", {"messages": [{**SAY, "tool_calls": [{"function": {"arguments": {}}}]}]}, "names no function"),
        (
            "messages",
            {"messages": [{**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "are no JSON",
        ),
        (
            "messages",
            {"messages": [{**SAY, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "that are a list",
        ),
        (
            "messages",
            {"messages": [{**SAY, "tool_calls": [{"name": "f", "mood": "x"}]}]},
            "has 'mood', which is not understood",
        ),
        (
            "messages",
            {"messages": [{**SAY, "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]},
            "type 'custom'",
        ),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "whose text must be JSON"),
        ("messages", {"messages": "[oops"}, "'messages' of the row is text but no JSON list"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(row_format, row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(row, row_format)


@pytest.mark.parametrize("row", [{"label": 0}, {"label": True}, {"weight": 1.0}, {"train": True}, {"loss": None}])
def test_a_number_or_yes_beside_an_answer_does_not_refuse_it(row):
    messages, _, _ = parse_row({"prompt": "a", "completion": "b", **row}, "prompt_completion")
    assert [message["content"] for message in messages] == ["a", "b"]


def test_columns_have_the_names_that_the_recipe_gives_them(tmp_path):
    rows = [{"question": "Two?", "answer": "2", "prompt": "not this", "id": 7}, {"question": "Three?", "answer": "3"}]
    columns = {"prompt": "question", "response": "answer"}
    found, problems = read(tmp_path, rows, "prompt_completion", columns=columns)
    assert [talk.messages[0]["content"] for talk in found] == ["Two?", "Three?"]
    assert [talk.messages[1]["content"] for talk in found] == ["2", "3"]
    assert [talk.reference for talk in found] == [None, None]
    assert problems.notes() == ["source s: columns that are not read: id, prompt"]
    dolly = [{"instruction": "Sum up", "context": "A text.", "response": "Short."}]
    (talk,), _ = read(tmp_path, dolly, "alpaca", columns={"input": "context", "response": "response"})
    assert [turn["content"] for turn in talk.messages] == ["Sum up\n\nA text.", "Short."]


def test_a_preferred_answer_beside_another_is_named(tmp_path):
    rows = [{"messages": [ASK, SAY], "chosen": [ASK, SAY]}, {"messages": [ASK, SAY]}]
    assert read(tmp_path, rows, "messages")[1].notes() == ["source s: columns that are not read: chosen"]
    rows = [{"chosen": [ASK, SAY], "rejected": [ASK]}]
    assert read(tmp_path, rows, "messages")[1].notes() == ["source s: columns that are not read: rejected"]


@pytest.mark.parametrize(
    ("row_format", "row", "columns", "unread"),
    [
        ("messages", {"messages": [ASK, SAY], "prompt": "Two?"}, {}, "prompt"),
        ("messages", {"messages": [ASK, SAY], "asked": "Two?"}, {"prompt": "asked"}, "asked"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "reference": "r", "answer": "s"}, {}, "answer"),
        ("alpaca", {"instruction": "a", "output": "b", "input": "c", "more": "d"}, {"input": "more"}, "input"),
    ],
)
def test_a_column_that_another_stands_in_for_is_named(tmp_path, row_format, row, columns, unread):
    _, problems = read(tmp_path, [row], row_format, columns=columns)
    assert problems.notes() == [f"source s: columns that are not read: {unread}"]


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("messages", {"prompt": "Three?", "chosen": [ASK, SAY]}),
        ("messages", {"prompt": [system("S"), ASK], "chosen": [ASK, SAY]}),
        ("prompt_completion", {"prompt": [ASK, SAY, ASK], "completion": [ASK, SAY]}),
        ("alpaca", {"instruction": "Two?", "input": "or three", "output": [ASK, SAY]}),
    ],
)
def test_a_prompt_that_its_answer_would_replace_is_refused(row_format, row):
    with pytest.raises(ValueError, match=r"does not repeat the turns of '(prompt|instruction)', which would be lost"):
        parse_row(row, row_format)


def test_a_column_that_no_row_has_is_a_mistake_of_the_recipe_and_one_that_some_lack_is_not(tmp_path):
    rows = [{"prompt": "a", "sys": "S"}, {"prompt": "b"}]
    found, _ = read(tmp_path, rows, "prompt_completion", columns={"system": "sys"})
    assert [len(talk.messages) for talk in found] == [2, 1]
    with pytest.raises(PromptError, match="no row has the column 'sis' that `columns` names"):
        read(tmp_path, rows, "prompt_completion", columns={"system": "sis"})


@pytest.mark.parametrize("limit", [1, 2])
def test_a_column_that_no_row_within_the_limit_has_is_a_mistake_too(tmp_path, limit):
    rows = [{"prompt": "a", "expected": "4"}, {"prompt": "b", "expected": "5"}]
    with pytest.raises(PromptError, match=f"no row within `limit: {limit}` has the column 'expectd' that `columns`"):
        read(tmp_path, rows, "prompt_completion", columns={"reference": "expectd"}, limit=limit)
    found, _ = read(tmp_path, rows, "prompt_completion", columns={"reference": "expected"}, limit=limit)
    assert [talk.reference for talk in found] == ["4", "5"][:limit]


def test_names_of_ignore_that_leave_nothing_out_are_told(tmp_path):
    rows = [{"messages": [ASK, {**SAY, "mood": "m"}], "id": 1}, {"messages": [ASK, SAY], "sys": "S"}]
    _, problems = read(tmp_path, rows, "messages", ignore=["mood", "id", "content", "moood", "sys"])
    assert problems.notes() == [
        "source s: `ignore` leaves nothing out by 'content', 'moood': no row read has such a column, nor a turn such "
        "a key besides its role and text",
    ]
    assert read(tmp_path, rows, "messages", ignore=["mood", "id", "sys"])[1].notes() == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "messages", "columns": {"response": "x"}}, "reads no 'response'"),
        ({"format": "text", "columns": {"txt": "x"}}, "did you mean 'text'"),
        ({"format": "alpaca", "columns": {"input": "x", "output": "x"}}, "'x' is given twice"),
        ({"format": "text", "supervise": "last"}, "trained from their second token on"),
        ({"format": "text", "date": "2026-01-31"}, "not rendered by a template"),
        ({"format": "messages", "template": "none", "date": "2026-01-31"}, "not rendered by a template"),
        ({"format": "cache", "ignore": ["x"]}, "taken as they are"),
        ({"format": "messages", "date": "31.1.2026"}, "date"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        PromptSource.model_validate({"source": "s", "path": "p", **settings})


def test_what_is_ignored_knowingly_is_left_out_of_row_and_turns(tmp_path):
    rows = [{"messages": [{**ASK, "mood": "glad"}, SAY], "context": "c", "tools": [TOOL]}]
    _, problems = read(tmp_path, rows, "messages")
    assert problems.total == 1
    (talk,), problems = read(tmp_path, rows, "messages", ignore=["mood", "context", "tools"])
    assert talk.messages == [ASK, SAY]
    assert problems.notes() == []

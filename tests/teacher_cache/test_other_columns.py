"""Columns and keys that change what a row means: all of them are refused at once, with advice that works."""

from __future__ import annotations

import re

import pytest

from shared.recipe.sections.prompts import COLUMNS
from teacher_cache.prompts.formats.prompt_formats import parse_row
from tests.teacher_cache.row_files import read

ASK, SAY = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
GIVEN = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row_format", "row", "columns"),
    [
        ("messages", {"messages": [ASK, SAY], "system_message": "Be brief.", "functions": [TOOL]}, ("system", "tools")),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}], "system_instruction": "S"}, ("system",)),
        ("alpaca", {"instruction": "a", "output": "b", "context": "c"}, ("input",)),
        ("prompt_completion", {**GIVEN, "chat_history": [["c", "d"]], "choices": ["e"]}, ("history",)),
        ("prompt_completion", {**GIVEN, "options": ["e"], "passages": ["p"], "functions": "no list"}, ()),
        (
            "messages",
            {"messages": [{"role": "system", "content": "A"}, ASK, SAY], "system_prompt": "B", "images": ["i"]},
            (),
        ),
    ],
)
def test_all_columns_of_a_prompt_are_refused_at_once_with_advice_that_works(tmp_path, row_format, row, columns):
    _, problems = read(tmp_path, [row], row_format)
    said = problems.listed[0].reason
    others = [name for name in row if name not in COLUMNS[row_format]]
    assert all(f"'{name}'" in said for name in others)
    named = dict(re.findall(r"(\w+): (\w+)", said.partition("`columns: {")[2].partition("}")[0]))
    assert set(named) == set(columns)
    ignored = re.findall(r"ignore: \[(.*?)\]", said)
    rest = ignored[0].split(", ") if len(ignored) > 1 else ()
    assert not named or read(tmp_path, [row], row_format, columns=named, ignore=rest)[1].total == 0
    assert read(tmp_path, [row], row_format, ignore=ignored[-1].split(", "))[1].total == 0


def test_all_unknown_keys_of_a_rows_turns_are_refused_at_once(tmp_path):
    rows = [{"messages": [{**ASK, "ip": "x", "toxic": False}, {**SAY, "toxic": False, "model": "m"}]}]
    _, problems = read(tmp_path, rows, "messages")
    assert "key 'ip', which is not understood" in problems.listed[0].reason
    assert "`ignore: [ip, toxic, model]`" in problems.listed[0].reason
    assert read(tmp_path, rows, "messages", ignore=["ip", "toxic", "model"])[1].total == 0


@pytest.mark.parametrize("mark", ["loss", "loss_weight", "trainable", "training"])
def test_a_turn_that_another_program_marks_as_context_is_not_trained(mark):
    row = {"messages": [ASK, {**SAY, mark: 0}, ASK, {**SAY, mark: True}]}
    assert parse_row(row, "messages")[0] == [ASK, {**SAY, "train": False}, ASK, SAY]


@pytest.mark.parametrize(
    "mark",
    [{"kto_tag": False}, {"label": "False"}, {"weight": "0.0"}, {"loss_mask": [1, 0]}, {"train_on_turn": [False]}],
)
def test_marks_of_other_programs_and_of_tables_of_text_are_refused(mark):
    (name,) = mark
    with pytest.raises(ValueError, match=rf"marks an answer that is not to be learnt; .*`ignore: \[{name}\]`"):
        parse_row(GIVEN | mark, "prompt_completion")
    kept = {"kto_tag": True, "label": "0", "weight": "0.5", "loss_mask": [1, 1], "train_on_turn": None}
    assert parse_row(GIVEN | kept, "prompt_completion")[0][-1]["content"] == "b"


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content", "Complex_CoT", "chain_of_thought"])
def test_thoughts_in_a_column_of_their_own_are_refused(tmp_path, name):
    thought = {name: "Two and two\nmake four."}
    with pytest.raises(ValueError, match=rf"column '{name}' holds thoughts of the answer .* `ignore: \[{name}\]`"):
        parse_row(GIVEN | thought, "prompt_completion")
    for row in (
        {"prompt": "a"} | thought,  # an answer is to be made
        {"prompt": "a", "completion": "<think>Two and two make four.</think>4"} | thought,
        GIVEN | {name: "on"},
    ):
        assert parse_row(row, "prompt_completion")[0][0]["content"] == "a"
    assert read(tmp_path, [GIVEN | thought], "prompt_completion", ignore=[name])[1].total == 0

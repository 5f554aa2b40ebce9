"""Prompt files become conversations, and what does not fit is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.files.prompt_files import content_hash
from teacher_cache.prompts.files.prompt_readers import MAX_LINE_BYTES
from teacher_cache.prompts.formats.prompt_formats import group_text, parse_row, prompt_text
from teacher_cache.prompts.problems import Problems, accepting, too_many
from teacher_cache.prompts.prompts import read_prompts

TURNS = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def source(path: Path | str, row_format: str = "messages", **settings) -> PromptSource:
    return PromptSource(source="math", path=str(path), format=row_format, **settings)


def write(path: Path, *rows, encoding="utf-8") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = "".join(line + "\n" for line in lines).encode(encoding)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def read(*sources: PromptSource) -> tuple[list, Problems]:
    problems = Problems()
    return list(read_prompts(sources, problems)), problems


@pytest.mark.parametrize(
    ("row_format", "row", "expected"),
    [
        ("messages", {"messages": TURNS}, TURNS),
        ("prompt_completion", {"prompt": "Two and two?", "completion": "Four."}, TURNS),
        ("alpaca", {"instruction": "Two and two?", "input": "", "output": "Four."}, TURNS),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
            TURNS,
        ),
        ("prompt_completion", {"prompt": "Two and two?"}, TURNS[:1]),
        ("alpaca", {"instruction": "Add.", "input": "2, 2", "output": "4"}, None),
    ],
)
def test_every_format_gives_the_same_turns(tmp_path, row_format, row, expected):
    (conversation,), problems = read(source(write(tmp_path / "a.jsonl", row), row_format))
    if expected is None:
        expected = [{"role": "user", "content": "Add.\n\n2, 2"}, {"role": "assistant", "content": "4"}]
    assert conversation.messages == expected
    assert conversation.place == f"{tmp_path}/a.jsonl:1"
    assert problems.total == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_lines_keep_their_numbers_in_every_compression(tmp_path, suffix):
    path = write(tmp_path / f"an odd, name{suffix}", {"text": "one\u2028two\u0085"}, "", {"text": "three"})
    found, _ = read(source(path, "text"))
    assert [(c.line, c.text) for c in found] == [(1, "one\u2028two\u0085"), (3, "three")]


def test_a_path_with_brackets_is_a_path_before_it_is_a_glob(tmp_path):
    found, _ = read(source(write(tmp_path / "[ab].jsonl", {"text": "one"}), "text"))
    assert [c.text for c in found] == ["one"]


def test_parquet_and_arrow_rows_are_numbered(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["x", None, "z"], "answer": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        found, _ = read(source(tmp_path / name, "prompt_completion"))
        assert [(c.line, len(c.messages), c.reference) for c in found] == [(1, 2, "1"), (2, 1, "2"), (3, 2, "3")]


def test_glob_reads_files_in_order_and_limit_stops_early(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "third"}, "not json")
    write(tmp_path / "a.jsonl", {"text": "first"}, {"text": "second"})
    found, problems = read(source(tmp_path / "*.jsonl", "text", limit=3))
    assert [c.text for c in found] == ["first", "second", "third"]
    assert problems.total == 0
    assert [c.path.rsplit("/", 1)[1] for c in found] == ["a.jsonl", "a.jsonl", "b.jsonl"]
    assert [c.text for c in read(source(tmp_path, "text", limit=1))[0]] == ["first"]


@pytest.mark.parametrize(
    ("row_format", "row", "reason"),
    [
        ("text", "{", "object per line, as `jq -c . OLD > NEW.jsonl` writes those that take several"),
        ("text", "[1]", "the row is a list but must be an object"),
        ("text", {"body": "x"}, "the row has no 'text' (found 'body'); is `format` right?"),
        ("text", {"text": 3}, "'text' of the row is a number but must be text"),
        ("text", {"text": " \n"}, "'text' is empty"),
        ("text", '{"text": "\\ud800"}', "half a surrogate pair"),
        ("text", "[" * 100_000, "nested too deeply"),
        ("messages", {"messages": []}, "'messages' is empty"),
        ("messages", {"messages": "hello"}, "'messages' of the row is text but must be a list"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ("messages", {"messages": [{"role": "user", "content": ""}]}, "messages[0] is an empty user turn"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
        ("messages", {"messages": ["hello"]}, "messages[0] is text but must be an object"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "'value' of conversations[0] is null"),
        (
            "prompt_completion",
            {"prompt": "x", "completion": ["y"]},
            "'completion' of the row is a list but must be text",
        ),
        ("alpaca", {"instruction": ""}, "'instruction' is empty"),
    ],
)
def test_a_malformed_row_is_set_aside_with_its_line_and_reason(tmp_path, row_format, row, reason):
    good = {
        "text": "fine",
        "messages": TURNS,
        "prompt": "a",
        "instruction": "b",
        "conversations": [{"from": "human", "value": "c"}],
    }
    path = write(tmp_path / "a.jsonl", good, row, good)
    found, problems = read(source(path, row_format))
    assert [c.line for c in found] == [1, 3]
    (problem,) = problems.listed
    assert problem.sentence().startswith(f"{path}:2: ")
    assert reason in problem.reason
    with pytest.raises(PromptError, match=r"a\.jsonl:2: .*1 of 3 rows cannot be used, more than the 1%.*them or so$"):
        problems.check(way_out=" or so")
    problems.check(threshold=0.5)


@pytest.mark.parametrize("row_format, row, advice", [
    ("messages", {"query": "a", "reply": "b"}, "`format: prompt_completion` with `columns: {prompt: query, r"),
    ("messages", {"input": "a", "Output ": "b"}, '`columns: {prompt: input, response: "Output "}` reads it'),
    ("text", {"conversations": [{"from": "human", "value": "c"}]}, "`format: sharegpt` reads it"),
    ("prompt_completion", {"instruction": "a", "input": "b", "output": "c"}, "`format: alpaca` reads it"),
    ("messages", {"question": "a", "context": "b"}, "`columns` names what it reads: {prompt: question"),
    ("sharegpt", {"frage": "a"}, "`columns` names what it reads: {prompt: question"),
    ("sharegpt", {"conversations": TURNS}, "(found 'role', 'content'); is `format` right? `format: messages` with"),
    ("messages", {"dialogue": TURNS}, "`format: messages` with `columns: {messages: dialogue}` reads it"),
    ("messages", {"Query": "a", "system_prompt": "b"}, "`columns: {prompt: Query, system: system_prompt}` reads it"),
    ("messages", {"messages": [{"from": "human", "value": "c"}]}, "`columns: {conversations: messages}` reads it"),
    ("text", {}, "(found nothing); is `format` right? `columns` names"),
])  # fmt: skip
def test_a_row_of_another_format_is_told_what_reads_it(tmp_path, row_format, row, advice):
    _, problems = read(source(write(tmp_path / "a.jsonl", row), row_format))
    assert advice in problems.listed[0].reason


def test_bytes_that_are_not_utf8_and_lines_beyond_the_bound_cost_only_their_row(tmp_path):
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n'
    path.write_bytes(b'{"text": "a"}\r\n{"text": "\xff"}\n' + long + b'{"text": "z"}')
    found, problems = read(source(path, "text"))
    assert [(c.line, c.text) for c in found] == [(1, "a"), (4, "z")]
    assert [problem.line for problem in problems.listed] == [2, 3]


def test_one_bad_row_among_many_passes_the_check(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": f"row {i}"} for i in range(150)], "oops")
    found, problems = read(source(path, "text"))
    problems.check()
    assert (len(found), problems.rows_read, problems.total) == (150, 151, 1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the data set has no row"),
        ("blank.jsonl", b"\n \n", "the data set has no row"),
        ("broken.parquet", b"PAR1 this is no parquet file", "cannot be read as parquet"),
        ("broken.jsonl.gz", b"this is not gzip", "cannot be read as json"),
        ("table.xlsx", b"a,b\n", "unknown kind of file"),
    ],
)
def test_an_unusable_file_is_one_sentence(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=reason) as caught:
        read(source(tmp_path / name, "text"))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_hub_an_unknown_name_is_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(self, path, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(
        PromptError, match=r"org/stories: neither a file nor a data set that the hub gives out \(ConnectionError\)"
    ):
        read(source("org/stories", "text"))


def test_a_hub_that_does_not_answer_is_the_reason_and_not_the_mode_that_its_library_is_put_into(monkeypatch):
    import huggingface_hub.constants as constants

    import shared.remote.hub as hub

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silent", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(PromptError, match=r"gives out \(http://127.0.0.1:9 does not answer"):
        read(source("org/stories", "text"))


def test_group_text_is_the_question_alone_whatever_the_format_or_answer():
    rows = [
        ("messages", {"messages": TURNS}),
        ("messages", {"messages": TURNS[:1]}),
        ("prompt_completion", {"prompt": "Two and two?", "completion": "5"}),
        ("text", {"text": "Two and two?"}),
    ]
    assert {group_text(*parse_row(row, row_format)[:2]) for row_format, row in rows} == {"Two and two?"}


def test_a_dialogue_is_one_group_whatever_its_row_holds_of_it():
    ask, again = TURNS[0], {"role": "user", "content": "And three?"}
    rows = [
        [ask],
        [{"role": "system", "content": "Be brief."}, *TURNS],
        [*TURNS, again],
        [
            {"role": "user", "content": " Two and\r\ntwo?\n"},
            *TURNS[1:],
            again,
            {"role": "assistant", "content": "Six."},
        ],
    ]
    assert {group_text(turns, None) for turns in rows} == {"Two and two?"}
    assert group_text([again], None) != "Two and two?"
    assert group_text(None, "a  text\n") == "a text"


def test_the_rule_of_older_caches_goes_by_everything_up_to_the_last_question():
    turns = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "And three?"}]
    expected = "system\nBe brief.\n\nuser\nTwo and two?\n\nassistant\nFour.\n\nuser\nAnd three?"
    assert group_text(turns, None, "prompt") == prompt_text(turns, None) == expected
    assert group_text([*turns, {"role": "assistant", "content": "Six."}], None, "prompt") == expected
    assert group_text(None, "a  text\n", "prompt") == "a  text\n"


def test_content_hash_follows_bytes_not_names(tmp_path):
    first = content_hash(source(write(tmp_path / "a.jsonl", {"text": "x"}), "text"))
    assert first == content_hash(source(write(tmp_path / "b.jsonl", {"text": "x"}), "text"))
    assert first != content_hash(source(write(tmp_path / "b.jsonl", {"text": "y"}), "text"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner)
    ),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    row_format=st.sampled_from(["messages", "prompt_completion", "alpaca", "sharegpt", "text"]),
    row=st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "answer"]
        ),
        JSON,
    )
    | JSON,
)
def test_any_json_either_fits_its_format_or_is_a_reason(row_format, row):
    try:
        messages, text, reference = parse_row(row, row_format)
    except ValueError as error:
        assert str(error)
        return
    assert (messages is None) != (text is None)
    assert reference is None or isinstance(reference, str)
    assert all(isinstance(turn["content"], str) for turn in messages or ())


def test_the_share_that_a_refusal_names_is_accepted_and_a_smaller_one_is_not():
    """0.58 x 50 is 28.999999999999996 in floats: 29 of 50 rows were refused with the share that was asked for."""
    for rows in range(1, 300):
        for unusable in range(1, rows + 1):
            share = accepting(unusable, rows)
            assert not too_many(unusable, rows, float(f"{share:g}"))
            assert too_many(unusable, rows, share - 0.001)
    assert not too_many(0, 0)

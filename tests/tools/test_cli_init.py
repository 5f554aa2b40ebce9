"""`decant init`: the starter validates as it is, whatever the names, and never overwrites."""

from __future__ import annotations

import csv
import gzip
import json
import resource
import shlex
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shared.errors import UsageError
from shared.recipe.file import load_recipe
from shared.recipe.sections.prompts import COLUMNS, PromptSource
from teacher_cache.prompts.formats.prompt_formats import parse_row
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts
from tests.shared import small_cache
from tools import cli
from tools.init_from_cache import init_from_cache
from tools.init_recipe import guess_format, init_recipe


@pytest.mark.parametrize("name", ["distil", "no", "1e5", "123", "true", "2024-01-01", "a.b_c-d"])
def test_starter_validates_for_every_name(tmp_path, name):
    path = init_recipe(name, "org/teacher", "student", "prompts.jsonl", tmp_path / "r.yaml")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.teacher.model, recipe.student.model) == (name, "org/teacher", "student")
    assert (recipe.capture.k, recipe.capture.mass, [stage.name for stage in recipe.stages]) == (64, 0.999, ["kd"])


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30))
def test_any_path_survives_the_way_through_yaml(tmp_path_factory, value):
    path = init_recipe("x", value, value, value, tmp_path_factory.mktemp("init") / "r.yaml")
    recipe = load_recipe(path)
    assert (recipe.teacher.model, recipe.student.model, recipe.prompts[0].path) == (value, value, value)


def test_existing_file_is_never_overwritten(tmp_path, capsys):
    target = tmp_path / "r.yaml"
    target.write_text("mine")
    assert cli.main(["init", "x", "--output", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["../up", "", "-x", "a b", "a" * 101])
def test_name_that_cannot_be_a_directory_is_refused(tmp_path, name):
    with pytest.raises(UsageError):
        init_recipe(name, "t", "s", "p", tmp_path / "r.yaml")


@pytest.mark.parametrize("row, expected", [
    *(({reads[0]: ""}, name) for name, reads in COLUMNS.items() if reads), ({"other": 1}, "messages"), ([1],
    "messages"),
])  # fmt: skip
def test_format_is_guessed_from_the_first_row(tmp_path, row, expected):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert guess_format(str(path))[0] == expected


def test_format_of_what_cannot_be_read_is_messages(tmp_path):
    assert guess_format(str(tmp_path / "none")) == ("messages", {}, "")


def test_every_format_has_its_columns_and_its_reader():
    assert get_args(PromptSource.model_fields["format"].annotation) == tuple(COLUMNS)
    for name, reads in COLUMNS.items():
        if reads:
            with pytest.raises(ValueError, match=reads[0]):
                parse_row({reads[0]: 7}, name)


ALPACA = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize("name, content, expected", [
    ("p.json", f"[{ALPACA}]", "alpaca"), ("p.jsonl.gz", gzip.compress(ALPACA.encode(), mtime=0), "alpaca"),
    ("p.jsonl", b"\xef\xbb\xbf" + ALPACA.encode() + b"\r\n", "alpaca"), ("p.csv", "prompt,completion\na,b\n",
    "prompt_completion"), ("p.tsv", "text\tsource\na\tb\n", "text"), ("p ü.txt", "plain words", "text"),
    ("set/train.json", f"[{ALPACA}]", "alpaca"), ("p.parquet", {"conversations": [[]]}, "sharegpt"),
])  # fmt: skip
def test_format_is_guessed_from_every_kind_of_file(tmp_path, name, content, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert guess_format(str(path if path.parent == tmp_path else path.parent))[:2] == (expected, {})


def test_columns_that_no_format_reads_are_named_in_the_recipe(tmp_path):
    (tmp_path / "p.csv").write_text("frage,solution\na,b\n")
    path = init_recipe("x", "t", "s", str(tmp_path / "p.csv"), tmp_path / "r.yaml")
    assert "# a guess: the first row has the columns frage, solution" in path.read_text()
    assert load_recipe(path).prompts[0].format == "messages"


@pytest.mark.parametrize("header, columns", [
    ("question,solution", {"prompt": "question", "response": "solution"}), ("prompt,reply", {"response": "reply"}),
    ('" Query","Réponse"', {"prompt": " Query"}), ("instruction,Answer", {"response": "Answer"}),
    ("prompt,chosen,answer", {}), ("id;INPUT;output", {"prompt": "INPUT", "response": "output"}),
])  # fmt: skip
def test_a_starter_names_columns_by_which_its_rows_are_read(tmp_path, header, columns):
    separator = ";" if ";" in header else ","
    (tmp_path / "p.csv").write_text(f"{header}\n{separator.join('abc'[: header.count(separator) + 1])}\n")
    path = init_recipe("x", "t", "s", str(tmp_path / "p.csv"), tmp_path / "r.yaml")
    (source,) = load_recipe(path).prompts
    assert source.columns == columns
    (conversation,) = read_prompts([source], problems := Problems())
    assert not problems.total
    assert len(conversation.messages) == 2 or "response" not in columns


@pytest.mark.parametrize("keys, row_format", [(("role", "content"), "messages"), (("from", "value"), "sharegpt")])
def test_turns_that_a_table_holds_as_json_are_found_under_any_name(tmp_path, keys, row_format):
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", "Hi, [you]"), ("assistant", "Ho"))]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["note", "talk"], ["[no list", json.dumps(turns)]])
    path = init_recipe("x", "t", "s", str(tmp_path / "p.csv"), tmp_path / "r.yaml")
    (source,) = load_recipe(path).prompts
    assert (source.format, list(source.columns.values())) == (row_format, ["talk"])
    (conversation,) = read_prompts([source], Problems())
    assert [turn["content"] for turn in conversation.messages] == ["Hi, [you]", "Ho"]


@pytest.mark.parametrize("below", ["a file/r.yaml", "a file/deep/r.yaml"])
def test_recipe_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path, below):
    (tmp_path / "a file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        init_recipe("x", "t", "s", "p", tmp_path / below)


def test_recipe_that_a_full_disk_cuts_is_said_to_be_that_and_leaves_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"r.yaml cannot be written \(File too large; free"):
            init_recipe("x", "t", "s", "p", tmp_path / "r.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_commands_named_for_a_path_with_a_space_can_be_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "x", "--output", "my dir/ü r.yaml"]) == 0
    said = capsys.readouterr().out
    assert shlex.split(said.split("next: ")[1]) == ["decant", "plan", "my dir/ü r.yaml"]
    assert "decant teach 'my dir/ü r.yaml'" in Path("my dir/ü r.yaml").read_text()


def test_plain_texts_get_a_starter_without_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("some words\n")
    Path("q.jsonl").write_text('{"messages": []}\n')
    assert load_recipe(init_recipe("texts", "t", "s", "p.txt")).generate is None
    assert load_recipe(init_recipe("talks", "t", "s", "q.jsonl")).generate is not None


@pytest.mark.parametrize(
    "listed, bf16, why",
    [
        ([], False, "no GPU was found here"),
        ([("NVIDIA H200", (9, 0))], True, "for NVIDIA H200, found here"),
        ([("NVIDIA H200", (9, 0)), ("Tesla T4", (7, 5))], False, "Tesla T4 has no tensor cores for"),
    ],
)
def test_starter_computes_in_bfloat16_where_the_machine_does_and_says_why(tmp_path, monkeypatch, listed, bf16, why):
    monkeypatch.setattr("tools.init_recipe.list_gpus", lambda: listed)
    path = init_recipe("x", "t", "s", "p", tmp_path / "r.yaml")
    assert load_recipe(path).stages[0].trainer.bf16 is bf16
    assert why in next(line for line in path.read_text().splitlines() if "bf16:" in line and "#" in line)


def test_of_several_layers_the_recipe_reads_that_of_the_teacher_who_answered(tmp_path, monkeypatch):
    answered = replace(small_cache.SEQUENCES, answers="generated by zed")
    monkeypatch.setattr(small_cache, "SEQUENCES", answered)
    layers = (small_cache.TOP, replace(small_cache.TOP, teacher="zed", weights_hash="other"))
    small_cache.build(tmp_path / "cache", layers=layers)
    path = init_from_cache("x", tmp_path / "cache", "org/student", tmp_path / "x.yaml")
    assert load_recipe(path).stages[0].targets == f"top6-{layers[1].hash8}"
    assert "or another layer of those above" in path.read_text()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("", {"forward_kl": 0.9, "cross_entropy": 0.1}),
        ("renamed-1", {"forward_kl": 0.9, "cross_entropy": 0.1}),
        ("bytes-1", {"forward_kl": 0.25, "alm": 0.25, "cross_entropy": 0.5}),
    ],
)
def test_a_projected_layer_is_learned_with_as_much_of_the_text_as_of_the_teacher(tmp_path, method, expected):
    layer = replace(small_cache.TOP, derived_from="top6-00000000" if method else "", method=method)
    small_cache.build(tmp_path / "cache", layers=(layer,))
    path = init_from_cache("x", tmp_path / "cache", "org/student", tmp_path / "x.yaml")
    assert {loss.name: loss.weight.start for loss in load_recipe(path).stages[0].losses} == expected


@pytest.mark.parametrize("student", ["empty", "./nothing", "file.json"])
def test_a_recipe_from_a_cache_names_a_student_that_is_a_model(tmp_path, monkeypatch, capsys, student):
    monkeypatch.chdir(tmp_path)
    small_cache.build(tmp_path / "cache", layers=(small_cache.TOP,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    assert cli.main(["init", "x", "--cache", "cache", "--student", student]) == 2
    assert capsys.readouterr().err.startswith("decant: error: --student: ")
    assert not Path("recipes").exists()

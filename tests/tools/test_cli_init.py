"""`decant init`: the starter validates as it is, whatever the names, and never overwrites."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shared.errors import UsageError
from shared.recipe.file import load_recipe
from tools import cli
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
    ({"messages": []}, "messages"), ({"conversations": []}, "sharegpt"), ({"instruction": "", "output": ""}, "alpaca"),
    ({"prompt": "", "completion": ""}, "prompt_completion"), ({"text": ""}, "text"), ({"other": 1}, "messages"), ([1],
    "messages"),
])  # fmt: skip
def test_format_is_guessed_from_the_first_row(tmp_path, row, expected):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert guess_format(path) == expected


def test_format_of_what_cannot_be_read_is_messages(tmp_path):
    assert guess_format(tmp_path / "none") == "messages"

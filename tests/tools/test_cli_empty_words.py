"""An option that is given an empty word, as a shell makes of a variable that is not set: refused, whichever it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from tools import cli
from tools.cli_parser import build_parser


def _options(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command with every option that takes one word, empty."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from _options(sub, (*words, name))
        elif action.option_strings and action.nargs in (None, "?"):
            yield (*words, action.option_strings[0], "")


@pytest.mark.parametrize("words", list(_options(build_parser())), ids=" ".join)
def test_an_empty_word_is_refused_by_the_name_of_its_option(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    said = capsys.readouterr().err
    assert (left.value.code, said.count("\n")) == (2, 1)
    assert f"argument {words[-2]}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["report", ""], ["export", ""], ["cache", "ls", ""], ["cache", "push", "c", ""], ["plan", ""]],
    ids=" ".join,
)
def test_an_empty_place_is_not_the_current_directory(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert (left.value.code, "'' is empty" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("name", ["student", "a/b/c", "/b", "a/", "a b/c", "https://hub/a/b"])
def test_a_repository_to_push_to_is_named_in_full_before_anything_is_written(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(["export", "run", "--push", name])
    assert (left.value.code, "expected ORG/NAME" in capsys.readouterr().err) == (2, True)

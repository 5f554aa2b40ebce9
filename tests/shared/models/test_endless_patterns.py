"""A tokenizer.json whose pattern never ends on a text: its library panics, and we say so in a sentence."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from shared.errors import ModelError
from shared.models.files import load_tokenizer
from shared.models.load_report import loading
from tests.tiny_models import make_tokenizer
from tools import cli

TEXT = "a" * 60 + "b"


@pytest.fixture
def place(tmp_path) -> Path:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    path.write_text(json.dumps(document))
    return tmp_path


def test_a_text_that_a_pattern_never_ends_on_is_one_sentence(place):
    tokenizer = load_tokenizer(place, trust_remote_code=False)
    for one in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert len(one("a few words")["input_ids"]) == len(one.tokenize("a few words")) > 1
        for texts in (TEXT, ["fine", TEXT]):
            with pytest.raises(ModelError, match=r"its tokenizer\.json cannot split one of the texts .*retry-limit"):
                one(texts)
    again = load_tokenizer(place, trust_remote_code=False)
    assert again("few")["input_ids"] == tokenizer("few")["input_ids"]


def test_a_library_that_gives_up_never_ends_in_a_traceback(place, monkeypatch, capsys):
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(place / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"it cannot be loaded: Onig.*; expected a file"), loading("it", "a file"):
        inner.encode(TEXT)
    monkeypatch.setitem(cli.COMMANDS, "doctor", lambda args: inner.encode(TEXT) and 0)
    assert cli.main(["doctor"]) == 1
    assert "decant: error: a library gave up on a file or a text (Onig" in capsys.readouterr().err
    for other in (SystemExit(3), GeneratorExit()):
        with pytest.raises(type(other)), loading("it"):
            raise other

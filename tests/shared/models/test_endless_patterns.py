"""A tokenizer.json whose pattern never ends on a text: its library panics, and we say so in a sentence."""

from __future__ import annotations

import json
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


def test_a_library_that_gives_up_never_ends_in_a_traceback(place, monkeypatch, capsys):
    tokenizer = load_tokenizer(place, trust_remote_code=False)
    assert len(tokenizer("a few words")["input_ids"]) > 1
    with pytest.raises(ModelError, match=r"it cannot be loaded: Onig.*; expected a file"), loading("it", "a file"):
        tokenizer(TEXT)
    monkeypatch.setitem(cli.COMMANDS, "doctor", lambda args: tokenizer(TEXT) and 0)
    assert cli.main(["doctor"]) == 1
    assert "decant: error: a tokenizer's library gave up on a text (Onig" in capsys.readouterr().err
    for other in (SystemExit(3), GeneratorExit()):
        with pytest.raises(type(other)), loading("it"):
            raise other

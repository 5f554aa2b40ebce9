"""A tokenizer that a model's type would encode otherwise than it does itself is told by a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.models.type_tokenizer import changed_by_type
from tests.tiny_models import make_llama, make_qwen2


def tokenizer_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*tokenizer*")}


def test_a_text_that_transformers_encodes_otherwise_in_a_directory_of_that_type_is_found(tmp_path):
    from transformers import AutoTokenizer

    plain, other = make_llama(tmp_path / "llama", num_layers=1), make_qwen2(tmp_path / "qwen2", num_layers=1)
    assert (plain / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    text = changed_by_type(tokenizer_of(plain), "qwen2")
    assert text is not None
    ids = [AutoTokenizer.from_pretrained(directory)(text)["input_ids"] for directory in (plain, other)]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2", "", "a-type-of-my-own"])
def test_types_that_leave_it_as_it_is_and_unknown_ones_are_none(tmp_path, kind):
    assert changed_by_type(tokenizer_of(make_llama(tmp_path / "llama", num_layers=1)), kind) is None


def test_a_tokenizer_as_that_type_loads_it_stays_as_it_is(tmp_path):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(make_qwen2(tmp_path / "qwen2", num_layers=1))
    loaded.save_pretrained(tmp_path / "saved")
    assert changed_by_type(tokenizer_of(tmp_path / "saved"), "qwen2") is None


def test_a_tokenizer_that_was_saved_to_fill_texts_up_and_cut_them_off_stays_as_it_is(tmp_path):
    files = tokenizer_of(make_llama(tmp_path / "llama", num_layers=1))
    padding = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    saved = json.loads(files["tokenizer.json"]) | {"padding": padding | {"pad_to_multiple_of": None}, "truncation": cut}
    assert changed_by_type(files | {"tokenizer.json": json.dumps(saved).encode()}, "llama") is None

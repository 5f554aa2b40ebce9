"""A tokenizer.json with impossible ids, with ids left out, and one that was saved to cut texts off and fill them up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from shared.errors import CacheError, ModelError
from shared.models.files import load_tokenizer
from shared.schema import MAX_VOCAB_SIZE
from shared.tokens.token_bytes import read_vocabulary
from shared.tokens.tokenizer_file import check_token_ids, num_ids, plain_tokenizer
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture
def place(tmp_path) -> Path:
    make_tokenizer(tmp_path)
    return tmp_path


def changed(place: Path, change) -> bytes:
    document = json.loads((place / "tokenizer.json").read_text())
    change(document)
    (place / "tokenizer.json").write_text(json.dumps(document))
    return (place / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("token_id", [MAX_VOCAB_SIZE, 4_000_000_000, 10**12, -1])
@pytest.mark.parametrize("is_added", [False, True])
def test_an_id_that_no_vocabulary_has_is_refused_before_a_library_allocates_for_it(place, token_id, is_added):
    def change(document):
        if is_added:
            document["added_tokens"].append({**document["added_tokens"][0], "id": token_id, "content": "<far>"})
        else:
            document["model"]["vocab"]["far"] = token_id

    tokenizer_json = changed(place, change)
    with pytest.raises(ValueError, match=f"a token of id {token_id}, and ids from 0 to 16,777,215 are possible"):
        check_token_ids(tokenizer_json)
    with pytest.raises(ModelError, match=f"the tokenizer cannot be loaded: it has a token of id {token_id}"):
        load_tokenizer(place, trust_remote_code=False)
    for read in (read_vocabulary, plain_tokenizer):
        with pytest.raises(CacheError, match=f"a token of id {token_id}"):
            read(tokenizer_json)


def test_long_numbers_that_are_no_ids_pass():
    scores = {"model": {"vocab": [["a", -10], ["b", -11.123456789012]]}, "added_tokens": []}
    check_token_ids(json.dumps(scores).encode())
    check_token_ids(b'{"model": {"vocab": {"12345678901": 0, ": -5": 1}}, "added_tokens": null}')


def test_texts_are_neither_cut_off_nor_filled_up(place):
    before = (place / "tokenizer.json").read_bytes()
    tokenizer_json = changed(
        place, lambda document: document.update(padding=PADDING | {"pad_token": "a"}, truncation=CUT)
    )
    text = "What is 12345 plus 3?"
    assert len(Tokenizer.from_str(tokenizer_json.decode()).encode(text).ids) != len(
        plain_tokenizer(before).encode(text)
    )
    assert plain_tokenizer(tokenizer_json).encode(text).ids == plain_tokenizer(before).encode(text).ids


def test_ids_that_are_left_out_count(place):
    assert num_ids(load_tokenizer(place, trust_remote_code=False)) == VOCAB_SIZE
    tokenizer_json = changed(place, lambda document: document["model"]["vocab"].update(rs=VOCAB_SIZE + 8))
    loaded = load_tokenizer(place, trust_remote_code=False)
    assert num_ids(loaded) == num_ids(plain_tokenizer(tokenizer_json)) == VOCAB_SIZE + 9 > len(loaded)


def test_a_directory_without_a_tokenizer_is_no_empty_one(place):
    shutil.copytree(place, place / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    (place / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ModelError, match=r"holds no tokenizer; copy tokenizer\.json and tokenizer_config\.json"):
        load_tokenizer(place / "model", trust_remote_code=False)

"""Model files: found, read, or refused in one sentence."""

from __future__ import annotations

import json

import pytest

from shared.errors import EngineError
from shared.identity import tokenizer_hash
from shared.recipe import Teacher
from teacher_cache.model_files import load_tokenizer, resolve_model, tokenizer_files
from teacher_cache.teacher_identity import know_teacher
from tests.tiny_models import make_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher", vocab_size=576)


def test_a_directory_says_what_an_identity_needs(model):
    known = know_teacher(Teacher(model=str(model)))
    assert (known.vocab_size, known.files.vocab_size, known.max_model_len, known.files.dtype) == (512, 576, 512, "float32")
    assert (known.files.revision, known.adapter_hash) == (None, None)
    assert know_teacher(Teacher(model=str(model), max_model_len=64)).max_model_len == 64


def test_tokenizer_files_load_to_the_same_tokenizer(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(resolve_model(str(model)))
    files = tokenizer_files(tokenizer)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Two apples?"}]
    assert again.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer_files(again) == files
    assert tokenizer_hash(files["tokenizer.json"]) == tokenizer_hash((model / "tokenizer.json").read_bytes())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "cannot be read as a model's config"),
        ("{", "cannot be read as a model's config"),
        ("[]", "holds no object"),
        (json.dumps({"vocab_size": "many"}), "`vocab_size` is 'many'; expected a positive integer"),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path, change, reason):
    if change is not None:
        (tmp_path / "config.json").write_text(change)
    with pytest.raises(EngineError, match=reason):
        _ = resolve_model(str(tmp_path)).vocab_size


def test_a_revision_of_a_directory_and_a_missing_adapter_are_refused(model, tmp_path):
    with pytest.raises(EngineError, match="leave the revision out"):
        resolve_model(str(model), "main")
    with pytest.raises(EngineError, match=r"no adapter_config\.json there"):
        know_teacher(Teacher(model=str(model), adapter=str(tmp_path)))
    with pytest.raises(EngineError, match="the tokenizer cannot be loaded"):
        (tmp_path / "config.json").write_text("{}")
        load_tokenizer(resolve_model(str(tmp_path)))

"""Model files: found, read, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import xxhash

from shared.cache.tokenizer_files import checked_tokenizer
from shared.cache.writing.cache_writer import CacheWriter
from shared.errors import EngineError, ModelError
from shared.identity.identity import difference
from shared.identity.weights_hash import tokenizer_hash
from shared.models.files import load_fast_tokenizer
from shared.recipe.sections.capture import TopCapture
from shared.recipe.sections.teacher import ServedTeacher, VllmTeacher
from student_train.stage.export import copy_tokenizer
from teacher_cache.teacher.model_files import resolve_model, tokenizer_files
from teacher_cache.teacher.teacher_identity import (
    know_teacher,
    layer_identity,
    sequences_identity,
    template_hash,
    template_hashes,
)
from tests.tiny_models import make_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher", vocab_size=576)


def test_a_directory_says_what_an_identity_needs(model):
    known = know_teacher(VllmTeacher(model=str(model)))
    assert (known.vocab_size, known.files.vocab_size, known.max_model_len, known.files.dtype) == (
        512,
        576,
        512,
        "float32",
    )
    assert (known.files.revision, known.adapter_hash) == (None, None)
    assert know_teacher(VllmTeacher(model=str(model), max_model_len=64)).max_model_len == 64


def test_tokenizer_files_load_to_the_same_tokenizer(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_fast_tokenizer(model, trust_remote_code=False)
    files = tokenizer_files(tokenizer)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Two apples?"}]
    assert again.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer_files(again) == files
    assert tokenizer_hash(files["tokenizer.json"]) == tokenizer_hash((model / "tokenizer.json").read_bytes())


def test_a_tokenizers_template_for_tools_stays_with_the_cache_and_leaves_with_the_student(model, tmp_path):
    """transformers keeps every template but the first in a folder of its own; rows with tools are rendered with it."""
    tokenizer = load_fast_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }} " + tokenizer.chat_template}
    known = replace(know_teacher(VllmTeacher(model=str(model))), tokenizer_files=tokenizer_files(tokenizer))
    identity = sequences_identity(known, VllmTeacher(model=str(model)), None)
    CacheWriter.create_or_open(tmp_path / "cache", identity, known.tokenizer_files)
    (tmp_path / "student").mkdir()
    with checked_tokenizer(tmp_path / "cache") as directory:
        copy_tokenizer(directory, tmp_path / "student")
        for place in (directory, tmp_path / "student"):
            again = load_fast_tokenizer(place, trust_remote_code=False)
            assert again.chat_template == tokenizer.chat_template


def test_several_templates_are_hashed_in_any_order_alike_and_an_older_order_is_known():
    texts = {"default": "a", "rag": "b", "tool_use": "c"}
    other = {name: texts[name] for name in ("tool_use", "default", "rag")}
    assert next(template_hashes(texts)) == next(template_hashes(other))
    assert next(template_hashes(texts)) == xxhash.xxh3_128_hexdigest(str(texts).encode())
    assert xxhash.xxh3_128_hexdigest(str(other).encode()) in template_hashes(texts)
    assert next(template_hashes({**texts, "rag": "d"})) not in template_hashes(texts)
    many = {f"{i}": "x" for i in range(9, 0, -1)}
    assert [*template_hashes(many)][1] == xxhash.xxh3_128_hexdigest(str(many).encode())
    assert list(template_hashes("a")) == [xxhash.xxh3_128_hexdigest(b"a")]
    assert list(template_hashes(None)) == list(template_hashes("")) == [""]


def test_a_cache_that_was_begun_with_templates_in_another_order_is_gone_on_with(model, tmp_path):
    known = know_teacher(VllmTeacher(model=str(model)))
    texts = {"default": "a", "rag": "b", "tool_use": "c"}
    other = str({name: texts[name] for name in ("default", "tool_use", "rag")})
    identity = replace(
        sequences_identity(known, VllmTeacher(model=str(model)), None),
        template=xxhash.xxh3_128_hexdigest(other.encode()),
    )
    CacheWriter.create_or_open(tmp_path / "cache", identity, known.tokenizer_files)
    assert template_hash(texts, tmp_path / "cache") == identity.template
    assert template_hash(texts, tmp_path / "none") == next(template_hashes(texts)) != identity.template
    assert template_hash({**texts, "rag": "d"}, tmp_path / "cache") != identity.template


@pytest.mark.parametrize("name", ["my template", "-x", "x" * 140, "ä"])
def test_a_template_whose_name_a_cache_cannot_hold_is_refused_with_the_way_out(model, tmp_path, name):
    place = tmp_path / "model"
    shutil.copytree(model, place)
    (place / "additional_chat_templates").mkdir()
    shutil.copy(place / "chat_template.jinja", place / "additional_chat_templates" / f"{name}.jinja")
    known = know_teacher(VllmTeacher(model=str(place)))
    identity = sequences_identity(known, VllmTeacher(model=str(place)), None)
    with pytest.raises(ModelError, match=f"{name}.jinja', whose name a cache cannot hold; .* take it out"):
        CacheWriter.create_or_open(tmp_path / "cache", identity, known.tokenizer_files)
    assert not (tmp_path / "cache").exists()


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
        know_teacher(VllmTeacher(model=str(model), adapter=str(tmp_path)))
    with pytest.raises(EngineError, match="the tokenizer cannot be loaded"):
        (tmp_path / "config.json").write_text("{}")
        load_fast_tokenizer(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "config, asked, recorded",
    [
        ({}, None, None),
        ({}, "fp8", "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "gptq-4bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, None, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, None, "awq-4bit"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq_marlin", "gptq_marlin"),
    ],
)
def test_layer_says_how_its_teacher_is_quantised(model, tmp_path, config, asked, recorded):
    plain = know_teacher(VllmTeacher(model=str(model)))
    quantised = shutil.copytree(model, tmp_path / "quantised")
    document = json.loads((quantised / "config.json").read_text())
    if "text_config" in config:
        config = {"text_config": {**document, **config["text_config"]}}
    (quantised / "config.json").write_text(json.dumps({**document, **config}))
    section = VllmTeacher(model=str(quantised), quantization=asked)
    known = know_teacher(section)
    identity = layer_identity(known, section, TopCapture())
    assert identity.quantization == recorded
    before = layer_identity(plain, VllmTeacher(model=str(model)), TopCapture())
    assert (difference(before, identity) is None) == (not config and asked is None)
    assert (known.weights_hash == plain.weights_hash) == (not config)


def test_adapter_on_a_quantised_checkpoint_is_refused_before_any_engine_starts(model, tmp_path):
    quantised = shutil.copytree(model, tmp_path / "quantised")
    document = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**document, "quantization_config": {"quant_method": "fp8"}}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    shutil.copy(model / "model.safetensors", adapter / "adapter_model.safetensors")
    know_teacher(VllmTeacher(model=str(model), adapter=str(adapter)))
    with pytest.raises(EngineError, match=r"are quantised \(fp8\); merge it before quantising"):
        know_teacher(VllmTeacher(model=str(quantised), adapter=str(adapter)))
    served = ServedTeacher(model=str(quantised), adapter=str(adapter), engine="server", servers=("http://a/v1",))
    assert know_teacher(served).adapter_hash is not None


def test_tokenizer_of_a_cache_names_no_code(model, tmp_path):
    """A teacher's tokenizer may come with Python; what a cache keeps of it loads without."""
    tokenizer = load_fast_tokenizer(model, trust_remote_code=False)
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    files = tokenizer_files(tokenizer)
    assert not any(b"auto_map" in data for data in files.values()) and not any(name.endswith(".py") for name in files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = load_fast_tokenizer(tmp_path, trust_remote_code=False)
    assert again("a 12")["input_ids"] == tokenizer("a 12")["input_ids"] and again.eos_token == tokenizer.eos_token

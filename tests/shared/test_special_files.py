"""A pipe or a device in a model's directory is named at once, by whoever opens it first."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from shared.errors import ModelError
from shared.identity.weights_hash import weights_hash
from shared.models.files import load_config, load_tokenizer
from shared.models.weights.checkpoint import check_checkpoint
from shared.models.weights.loading import load_causal_lm
from shared.special_files import refuse_links_outside
from teacher_cache.teacher.model_files import resolve_model, tokenizer_files
from tests.tiny_models import make_qwen3, make_tokenizer

OPENERS = {
    "fingerprint": weights_hash,
    "files": lambda path: resolve_model(str(path)),
    "checkpoint": lambda path: check_checkpoint(path, what="the teacher", trust_remote_code=False),
    "config": lambda path: load_config(path, what="the student", trust_remote_code=False),
    "tokenizer": lambda path: load_tokenizer(path, trust_remote_code=False),
    "weights": lambda path: load_causal_lm(path, what="the student", trust_remote_code=False),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    make_qwen3(directory)
    make_tokenizer(directory)
    return directory


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_special_files_of_a_model_are_refused_before_they_are_opened(model, tmp_path, name, kind, opener):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=rf"{name} is {kind} where a model has a regular file"):
        OPENERS[opener](directory)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"])
def test_texts_of_a_model_without_end_are_refused_before_they_are_read(model, tmp_path, name, opener):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / name).touch()
    os.truncate(directory / name, 2**42)
    with pytest.raises(ModelError, match=rf"{name} has 4,398,046,511,104 bytes, and a text of a model has at most"):
        OPENERS[opener](directory)


def test_a_pipe_among_the_templates_for_tools_is_not_waited_for(model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "additional_chat_templates").mkdir()
    os.mkfifo(directory / "additional_chat_templates" / "tool_use.jinja")
    with pytest.raises(ModelError, match=r"tool_use\.jinja is a pipe"):
        load_tokenizer(directory, trust_remote_code=False)


def test_links_to_files_and_links_that_lead_nowhere_are_let_through(model, tmp_path):
    directory = tmp_path / "snapshot"
    directory.mkdir()
    for path in model.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert weights_hash(directory) == weights_hash(model)
    assert load_causal_lm(directory, what="the student", trust_remote_code=False) is not None


WRONG = {
    "vocab_size": -1,
    "dtype": 5,
    "rope_scaling": {"type": "nosuch"},
    "head_dim": 0,
    "num_attention_heads": 0,
    "hidden_act": "os.system",
    "text_config": 5,
    "rope_parameters": {"rope_type": "linear", "factor": "x"},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_config_that_no_model_can_be_made_of_is_refused_in_a_sentence(model, tmp_path, key):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: WRONG[key]}))
    with pytest.raises(ModelError, match=r"the teacher .*cannot be loaded as a language model"):
        check_checkpoint(directory, what="the teacher", trust_remote_code=False)


class Runs:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_that_hold_code_are_refused_and_not_run(model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "model.safetensors").unlink()
    torch.save({"a": Runs(str(tmp_path / "was-run"))}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as weights"):
        check_checkpoint(directory, what="the teacher", trust_remote_code=False)
    assert not (tmp_path / "was-run").exists()


def linked(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("layout", ["snapshot", "local directory", "inside"])
def test_tokenizers_of_a_hubs_store_and_links_within_a_directory_are_copied(model, tmp_path, layout):
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    directory = tmp_path / "mine" if layout != "snapshot" else blobs.parent / "snapshots" / ("c" * 40)
    for number, path in enumerate(sorted(model.iterdir())):
        blob = blobs / f"{number:040x}" if layout != "inside" else directory / "kept" / path.name
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        linked(directory / path.name, os.path.relpath(blob, directory))
    tokenizer = load_tokenizer(directory, trust_remote_code=False)
    assert tokenizer_files(tokenizer) == tokenizer_files(load_tokenizer(model, trust_remote_code=False))


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret", "../blobs/" + "a" * 40, "chat_template.jinja"])
def test_a_file_from_elsewhere_on_the_machine_is_no_part_of_a_tokenizer(model, tmp_path, target):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    for other in (tmp_path / "secret", tmp_path / "blobs" / ("a" * 40)):
        other.parent.mkdir(exist_ok=True)
        other.write_text("password")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    link = linked(directory / "chat_template.jinja", target)
    with pytest.raises(ModelError, match=rf"chat_template.jinja is a link to {target}, outside of"):
        refuse_links_outside(directory, [link])
    if link.exists():
        with pytest.raises(ModelError, match="put the file itself there"):
            tokenizer_files(load_tokenizer(directory, trust_remote_code=False))


@pytest.mark.parametrize("place", ["additional_chat_templates", "additional_chat_templates/tool_use.jinja"])
def test_a_template_for_tools_from_elsewhere_on_the_machine_is_no_part_of_a_tokenizer(model, tmp_path, place):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tool_use.jinja").write_text("password")
    folder = place == "additional_chat_templates"
    linked(directory / place, tmp_path / "elsewhere" / ("" if folder else "tool_use.jinja"))
    tokenizer = load_tokenizer(directory, trust_remote_code=False)
    assert tokenizer.chat_template["tool_use"] == "password"
    with pytest.raises(ModelError, match=rf"{place} is a link to .*; put the file itself there"):
        tokenizer_files(tokenizer)

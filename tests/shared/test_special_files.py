"""A pipe or a device in a model's directory is named at once, by whoever opens it first."""

from __future__ import annotations

import os
import shutil

import pytest

from shared.errors import ModelError
from shared.identity.weights_hash import weights_hash
from shared.models.checkpoint import check_checkpoint
from shared.models.files import load_config, load_tokenizer
from shared.models.loading import load_causal_lm
from teacher_cache.teacher.model_files import resolve_model
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


def test_links_to_files_and_links_that_lead_nowhere_are_let_through(model, tmp_path):
    directory = tmp_path / "snapshot"
    directory.mkdir()
    for path in model.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert weights_hash(directory) == weights_hash(model)
    assert load_causal_lm(directory, what="the student", trust_remote_code=False) is not None

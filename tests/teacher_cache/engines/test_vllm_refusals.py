"""What a real vLLM would take and answer from nothing, or cannot start with: each is refused in a sentence."""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import EngineError, ModelError
from shared.recipe.recipe import Generate
from shared.recipe.sections.capture import TopCapture
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.engines import GenerateRequest, open_engine
from tests.tiny_models import VOCAB_SIZE, make_llama, make_qwen3, overflow, spoil

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

ANSWER = Generate(max_new_tokens=24)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("teacher"), max_position_embeddings=512)


def test_missing_adapter_is_a_sentence(model_dir, tmp_path):
    with pytest.raises(EngineError, match=r"no adapter_config\.json there"):
        open_engine(VllmTeacher(model="m", adapter=str(tmp_path)), None, for_generation=None, model_dir=model_dir)


def test_one_missing_tensor_is_refused_before_vllm_starts(model_dir, tmp_path):
    """vLLM itself takes a checkpoint without one `down_proj`, and answers with whatever the memory held."""
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    shutil.copytree(model_dir, tmp_path / "lacking")
    save_file(weights, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensor is missing \(first: model\.layers\.1\.mlp\.down_proj\.weight\)"):
        open_engine(VllmTeacher(model="m"), None, for_generation=None, model_dir=tmp_path / "lacking")


def test_model_that_cannot_start_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such"}')
    with pytest.raises(ModelError, match=f"^{tmp_path}: holds no weights"):
        open_engine(VllmTeacher(model="m"), None, for_generation=None, model_dir=tmp_path)
    save_file({"head": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="vLLM cannot start with"):
        open_engine(VllmTeacher(model="m"), None, for_generation=None, model_dir=tmp_path)


@pytest.mark.parametrize("own_process", ["0", "1"], ids=["in this process", "in a process of its own"])
def test_answers_of_a_model_that_computes_nan_are_refused(model_dir, tmp_path, monkeypatch, own_process):
    """vLLM goes on with token 0 there, in other rows of the batch too, and such answers were committed."""
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    spoil(broken, VOCAB_SIZE // 2)  # unknown to the start where nothing is captured
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", own_process)
    teacher = VllmTeacher(model="m", dtype="float32")
    asked = [GenerateRequest(0, 0, [5, 6, 7], 1), GenerateRequest(1, 0, [5, VOCAB_SIZE // 2, 6], 2)]
    with (
        closing(open_engine(teacher, None, for_generation=ANSWER, model_dir=broken)) as engine,
        pytest.raises(EngineError, match=r"^the model computes NaN instead of numbers"),
    ):
        list(engine.generate(asked, ANSWER))


def test_head_that_is_too_large_for_16_bits_is_refused_at_the_start(tmp_path):
    """Plug-in and arrays were called wrong, answers were committed, and scoring refused them."""
    overflow(make_llama(tmp_path))
    with pytest.raises(EngineError, match=r"^the model computes NaN instead of numbers"):
        open_engine(
            VllmTeacher(model="m", dtype="float16", head_dtype="auto"),
            TopCapture(k=4),
            for_generation=ANSWER,
            model_dir=tmp_path,
        )

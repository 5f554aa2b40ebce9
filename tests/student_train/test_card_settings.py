"""Settings that need a card's packages: honoured where they run, refused by name where they cannot."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Student
from student_train.stage.stages import run_stages
from student_train.student import liger

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")


def losses(recipe):
    return [
        json.loads(line)["loss"] for line in (recipe.output_dir / "train/kd/metrics.jsonl").read_text().splitlines()
    ]


@needs_bitsandbytes
def test_four_bit_student_trains_its_adapter_alone_and_exports_the_unquantised_sum(recipe_of, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"max_steps": 4, "learning_rate": 1e-2, "gradient_checkpointing": True}
    recipe = recipe_of(student={"adapter": "qlora", "model": str(tiny.llama)}, trainer=settings)
    (model_dir,) = run_stages(recipe)
    values = losses(recipe)
    assert values[-1] < values[0]
    plain = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(model_dir.parent / "adapter")).eval()
    saved = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    probe = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=probe).logits, adapted(input_ids=probe).logits, atol=1e-4, rtol=1e-4)
    assert "quantization_config" not in json.loads((model_dir / "config.json").read_text())


@needs_bitsandbytes
def test_weights_of_a_four_bit_student_are_held_in_four_bits(tiny):
    from bitsandbytes.nn import Linear4bit

    from student_train.batch.dataset import CacheList
    from student_train.student.student import load_student

    wanted = Student.model_validate({"model": str(tiny.llama), "adapter": "qlora"})
    model = load_student(wanted, None, CacheList.open([tiny.cache], None))
    linear = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert linear
    assert all(isinstance(module, Linear4bit) for module in linear)
    assert {module.weight.quant_type for module in linear} == {"nf4"}
    assert model.lm_head.weight.dtype == torch.float32
    with pytest.raises(TrainingError, match="qlora over fresh weights"):
        load_student(wanted.model_copy(update={"init": "random"}), None, CacheList.open([tiny.cache], None))


@needs_bitsandbytes
def test_gradients_over_four_bit_weights_are_those_over_the_same_weights_unpacked_also_after_an_evaluation(tiny):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    from student_train.batch.dataset import CacheList
    from student_train.student.student import add_adapter, load_student

    wanted = Student.model_validate({"model": str(tiny.llama), "adapter": "qlora"})
    packed = load_student(wanted, None, CacheList.open([tiny.cache], None))
    plain = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    modules = dict(plain.named_modules())
    for name, layer in packed.named_modules():
        if isinstance(layer, Linear4bit):
            unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            modules[name].weight.data = unpacked.reshape(modules[name].weight.shape).float()
    probe = torch.arange(3, 40)[None]
    gradients = []
    for model in (packed, plain):
        adapted = add_adapter(model, wanted.adapter)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
            adapted.eval()(input_ids=probe)
        adapted.train()(input_ids=probe, labels=probe).loss.backward()
        gradients.append({name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-3)


@needs_bitsandbytes
def test_8_bit_optimizer_keeps_8_bit_state(recipe_of, monkeypatch):
    from student_train.train.trainer import DistilTrainer

    made = []
    original = DistilTrainer.create_optimizer
    monkeypatch.setattr(
        DistilTrainer, "create_optimizer", lambda self, model=None: made.append(original(self, model)) or made[0]
    )
    run_stages(recipe_of(trainer={"max_steps": 2, "optim": "adamw_8bit"}))
    types = {state["state1"].dtype for state in made[0].state.values() if state["state1"].numel() >= 4096}
    assert torch.uint8 in types


@no_gpu
@needs_bitsandbytes
def test_paged_optimizer_without_a_gpu_is_refused(recipe_of):
    with pytest.raises(TrainingError, match=r"paged_adamw_8bit, whose pages need an NVIDIA GPU; use adamw_8bit"):
        run_stages(recipe_of(trainer={"optim": "paged_adamw_8bit"}))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizer_of_a_missing_package_is_refused(recipe_of, monkeypatch, optim):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(TrainingError, match=rf"trainer\.optim is {optim}, which needs the package bitsandbytes"):
        run_stages(recipe_of(trainer={"optim": optim}))
    with pytest.raises(TrainingError, match=r"student\.adapter is qlora, which needs the package bitsandbytes"):
        run_stages(recipe_of(student={"adapter": "qlora"}))


@no_gpu
def test_liger_without_package_or_gpu_is_refused_by_name(recipe_of):
    with pytest.raises(TrainingError, match=r"student\.liger is on, which needs .*an NVIDIA GPU"):
        run_stages(recipe_of(student={"liger": True}))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attention is installed")
def test_flash_attention_that_is_not_installed_is_refused(recipe_of):
    with pytest.raises(
        TrainingError, match=r"student\.attention is flash_attention_2, which needs the package flash-attn"
    ):
        run_stages(recipe_of(student={"attention": "flash_attention_2"}))


def test_liger_replaces_norm_mlp_and_rotary_but_no_loss_and_leaves_transformers_as_it_was(tiny):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3 import modeling_qwen3

    model = AutoModelForCausalLM.from_pretrained(tiny.qwen3)
    before = (modeling_qwen3.apply_rotary_pos_emb, modeling_qwen3.Qwen3MLP, type(model).forward)
    with liger.liger_layers(model, wanted=True):
        assert "liger" in modeling_qwen3.apply_rotary_pos_emb.__module__
        assert "Liger" in model.model.norm.forward.__qualname__
        assert "Liger" in model.model.layers[0].mlp.forward.__qualname__
        assert "liger" not in model.forward.__module__, "its fused loss is off"
    assert (modeling_qwen3.apply_rotary_pos_emb, modeling_qwen3.Qwen3MLP, type(model).forward) == before
    model.config.model_type = "unheard-of"
    with (
        pytest.raises(TrainingError, match="knows no layers of a model of type unheard-of"),
        liger.liger_layers(model, wanted=True),
    ):
        pass

"""The arithmetic against a table that was worked out independently, and against bytes counted while a small student
trains.
"""

from __future__ import annotations

import pytest
import torch

from shared.recipe.recipe import StageTrainer, Student
from student_train.fit.memory import GIB, estimate_memory
from student_train.fit.model_shape import shape_of
from tests.student_train.counted_bytes import counted_step

SIZES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
PARAMETERS = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}
FULL = ({"dtype": "float32"}, {"bf16": True})
NARROW = ({"dtype": "bfloat16"}, {"optim": "adamw_8bit"})
FOUR_BIT = ({"dtype": "bfloat16", "adapter": "qlora"}, {})
TABLE = [
    ("0.6B", FULL, {4096: 13.2, 8192: 13.9, 16384: 15.1, 32768: 17.7}),
    ("1.7B", NARROW, {4096: 13.9, 8192: 15.0, 16384: 17.2, 32768: 21.7}),
    ("4B", FOUR_BIT, {4096: 6.7, 8192: 8.5, 16384: 11.9, 32768: 18.9}),
    ("8B", FOUR_BIT, {4096: 10.8, 8192: 13.2, 16384: 18.1}),
]


def qwen3(size):
    from transformers import Qwen3Config

    hidden, intermediate, layers, heads, tied = SIZES[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("size", SIZES)
def test_shape_has_the_published_number_of_parameters(size):
    assert shape_of(qwen3(size)).num_parameters == PARAMETERS[size]


@pytest.mark.parametrize(("size", "settings", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_estimate_is_within_15_percent_of_the_table(size, settings, expected):
    shape = shape_of(qwen3(size))
    student_settings, trainer_settings = settings
    student = Student.model_validate(
        {"model": "m", "gradient_checkpointing": True, "attention": "flash_attention_2", **student_settings}
    )
    for num_tokens, gib in expected.items():
        trainer = StageTrainer.model_validate({"pack_tokens": num_tokens, **trainer_settings})
        assert estimate_memory(shape, student, trainer).total / GIB == pytest.approx(gib, rel=0.15), num_tokens


def test_adapter_has_as_many_parameters_as_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = qwen3("0.6B")
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config),
            LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 16 * shape_of(config).lora_size == trained


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


COUNTED = [
    ({}, {"bf16": True, "gradient_checkpointing": True}),
    slow({}, {"bf16": True, "gradient_accumulation_steps": 2}),
    slow({}, {}),
    ({"dtype": "bfloat16"}, {"gradient_checkpointing": True, "pack_tokens": 1536}),
    slow({"dtype": "bfloat16"}, {}),
    slow({"dtype": "bfloat16", "adapter": "lora"}, {"gradient_checkpointing": True, "pack_tokens": 1536}),
    ({"dtype": "bfloat16", "adapter": "lora"}, {"bf16": True}),
    slow({"adapter": "lora"}, {"bf16": True, "gradient_checkpointing": True, "pack_tokens": 1536}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("student_settings", "trainer_settings"), COUNTED, ids=str)
def test_estimate_is_within_10_percent_of_counted_bytes(student_settings, trainer_settings):
    student = Student.model_validate({"model": "m", **student_settings})
    trainer = StageTrainer.model_validate({"pack_tokens": 768, "operator_chunk_mib": 1, **trainer_settings})
    counted, shape = counted_step(student, trainer)
    estimate = estimate_memory(shape, student, trainer, has_wide_products=False)
    assert estimate.allocated == pytest.approx(counted, rel=0.10), f"{estimate.moment}: {estimate.terms()}"
    assert estimate.allocated == sum(estimate.terms().values()) - estimate.workspace

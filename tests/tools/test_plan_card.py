"""`decant plan --card`: what fits, what is refused and with which advice, and what must always hold of the bytes."""

from __future__ import annotations

import json
import re

import pytest

from shared.errors import TrainingError, UsageError
from shared.recipe.recipe import Recipe
from student_train.fit.memory import GIB, estimate_memory
from student_train.fit.model_shape import ModelShape
from tools.cli import main
from tools.plan.plan_card import card_bytes, card_text, plan_card

SIZES = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12288, 36, 32, False)}


def config(size):
    hidden, intermediate, layers, heads, tied = SIZES[size]
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }


def recipe(size, student=None, trainer=None, **stage) -> Recipe:
    arguments = {"pack_tokens": 4096, "gradient_accumulation_steps": 4, **(trainer or {})}
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": "x",
            "cache": "c",
            "student": {"model": "./not-here", **(student or {})},
            "assume": {"student": {"config": config(size)}},
            "stages": [{"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": arguments, **stage}],
        }
    )


EIGHT = {"learning_rate": 2e-5, "optim": "adamw_8bit"}
QLORA = {"dtype": "bfloat16", "adapter": "qlora"}


@pytest.mark.parametrize(
    ("size", "student", "trainer"),
    [
        ("0.6B", {}, {"bf16": True}),
        ("1.7B", {"dtype": "bfloat16"}, {"optim": "adamw_8bit"}),
        ("8B", QLORA, {"bf16": True}),
    ],
)
def test_common_students_fit_24_gib_with_the_same_tokens_per_step(size, student, trainer):
    wanted = recipe(size, student, trainer)
    stage = plan_card(wanted, 24 * GIB)["stages"]["kd"]
    chosen = stage["settings"]
    packs = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    assert chosen["pack_tokens"] * packs == 4 * 4096
    assert sum(stage["terms"].values()) == stage["total_bytes"] <= 24 * GIB


def test_advice_given_as_options_makes_the_recipe_fit_as_written():
    from shared.recipe.override import apply_override

    wanted = recipe("8B", QLORA, {"bf16": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1})
    stage = plan_card(wanted, 16 * GIB)["stages"]["kd"]
    assert not stage["as_written_fits"]
    document = wanted.model_dump(mode="json")
    for option in stage["set"]:
        apply_override(document, option)
    again = plan_card(Recipe.model_validate(document), 16 * GIB)["stages"]["kd"]
    assert again["as_written_fits"]
    assert again["set"] == []
    assert again["total_bytes"] == stage["total_bytes"] == again["as_written_bytes"]


def test_card_too_small_for_kept_activations_recomputes_them_and_a_larger_one_keeps_them():
    wanted = recipe("1.7B", {"dtype": "bfloat16"}, {"optim": "adamw_8bit"})
    small, large = (plan_card(wanted, size * GIB)["stages"]["kd"]["settings"] for size in (17, 80))
    assert (small["gradient_checkpointing"], large["gradient_checkpointing"]) == (True, False)
    assert large["per_device_train_batch_size"] >= small["per_device_train_batch_size"]


@pytest.mark.parametrize(
    ("size", "student", "trainer", "gib", "advice"),
    [
        ("8B", {}, {"bf16": True}, 24, r"use adapter: lora with dtype: bfloat16 \(\d+\.\d GiB\)$"),
        ("8B", {"dtype": "bfloat16", "adapter": "lora"}, {}, 14, r"use adapter: qlora with dtype: bfloat16"),
        ("0.6B", {}, {}, 9, r"set optim: adamw_8bit"),
        ("1.7B", {"dtype": "bfloat16", "adapter": "lora"}, {"pack_tokens": 32768}, 8, r"set pack_tokens: \d+ \("),
        ("8B", QLORA, {}, 4, r"use a card of \d+ GiB$"),
    ],
)
def test_student_that_cannot_fit_is_refused_with_the_smallest_change(size, student, trainer, gib, advice):
    with pytest.raises(
        TrainingError, match=rf"^stage 'kd' .* needs at least \d.* where the card has {gib}.0 GiB; .*{advice}"
    ):
        plan_card(recipe(size, student, trainer), gib * GIB)


def shape(**changes) -> ModelShape:
    sizes = {
        "num_parameters": 600_000_000,
        "num_embedding_parameters": 155_000_000,
        "num_head_parameters": 155_000_000,
        "num_linear_parameters": 440_000_000,
        "largest_linear": 3_000_000,
        "num_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "query_size": 2048,
        "key_size": 1024,
        "num_heads": 16,
        "lora_size": 630_784,
        "is_tied": True,
    }
    return ModelShape(**{**sizes, **changes})


@pytest.mark.parametrize("kind", ["none", "lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_grow_with_tokens_layers_and_kept_activations_and_shrink_with_an_adapter(kind, dtype):
    built = recipe("0.6B", {"adapter": kind, "dtype": dtype})
    student, trainer = built.student, built.stages[0].trainer
    first = estimate_memory(shape(), student, trainer).total
    longer = trainer.model_copy(update={"pack_tokens": 8192})
    assert estimate_memory(shape(), student, longer).total > first
    assert estimate_memory(shape(num_layers=36), student, trainer).total > first
    assert estimate_memory(shape(), student, trainer, recomputes=True).total < first
    wider = trainer.model_copy(update={"operator_chunk_mib": 8192})
    assert estimate_memory(shape(), student, wider).total >= first
    full = recipe("0.6B", {"dtype": dtype}).student
    assert (
        estimate_memory(shape(), student, trainer, recomputes=True).total
        <= estimate_memory(shape(), full, trainer, recomputes=True).total
    )


def test_8_bit_and_paged_state_are_smaller_than_32_bit_state():
    student = recipe("0.6B").student
    sizes = {}
    for optim in ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"):
        trainer = recipe("0.6B", trainer={"optim": optim}).stages[0].trainer
        sizes[optim] = estimate_memory(shape(), student, trainer, recomputes=True).total
    assert sizes["paged_adamw_8bit"] < sizes["adamw_8bit"] < sizes["adamw_torch_fused"] < sizes["adamw_torch"]


def test_unknown_student_is_refused_and_stated_sizes_are_named():
    stated = plan_card(recipe("0.6B", {}, {"bf16": True}), 24 * GIB)
    assert "assume.student" in card_text(stated)
    bare = recipe("0.6B").model_copy(update={"assume": Recipe.model_fields["assume"].default})
    with pytest.raises(
        TrainingError, match=r"config of the student '\./not-here' cannot be loaded: .*assume\.student\.config"
    ):
        plan_card(bare, 24 * GIB)


def test_size_of_a_card_is_read_with_its_unit_or_refused():
    assert card_bytes("24GiB") == 24 * GIB
    for wrong in ("24", "0GiB", "a lot", "24 gib"):
        with pytest.raises(UsageError, match="expected one such as 24GiB"):
            card_bytes(wrong)


def test_command_prints_a_table_or_json_and_refuses_in_a_sentence(tmp_path, capsys):
    from shared.recipe.file import dump_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe("0.6B", {}, {"bf16": True})))
    assert main(["plan", str(path), "--card", "24GiB"]) == 0
    text = capsys.readouterr().out
    assert "0.60 billion parameters" in text
    assert "optimizer" in text
    assert main(["plan", str(path), "--card", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["kd"]["as_written_bytes"] > 10 * GIB
    assert main(["plan", str(path), "--card", "2GiB"]) == 1
    assert capsys.readouterr().err.startswith("decant: error: stage 'kd'")


@pytest.mark.parametrize(
    ("card", "way"), [(80, "masters in float32 with 8-bit states fit"), (16, "rounding by chance fit")]
)
def test_stage_that_rounds_its_updates_away_is_offered_what_the_card_has_room_for(card, way):
    wanted = recipe("1.7B", {"dtype": "bfloat16", "gradient_checkpointing": True}, EIGHT)
    text = card_text(plan_card(wanted, card * GIB))
    assert "learning rate 2e-05 moves 30% of them" in text
    (line,) = (line for line in text.splitlines() if "fit this card" in line)
    assert way in line
    trained = dict(re.findall(r"--set stages\.kd\.trainer\.(\w+)=(\S+)", line))
    student = dict(re.findall(r"--set student\.(\w+)=(\S+)", line))
    changed = recipe("1.7B", {"gradient_checkpointing": True, "dtype": "bfloat16"} | student, EIGHT | trained)
    assert "moves 30%" not in card_text(plan_card(changed, card * GIB)), "the advice works"

"""`decant plan --card`: what fits, what is refused and with which advice, and what must always hold of the bytes."""

from __future__ import annotations

import json
import re

import pytest

from shared.errors import TrainingError, UsageError
from shared.recipe.recipe import Recipe
from student_train.fit.memory import GIB, StepContext, estimate_memory
from student_train.fit.model_shape import ModelShape
from tools.cli import main
from tools.plan.plan_card import Cards, card_text, plan_card, read_cards

SIZES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "8B": (4096, 12288, 36, 32, False),
    "70B": (8192, 28672, 80, 64, False),
}
PARAMETERS = {"0.6B": 596_049_920}


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
    stage = plan_card(wanted, Cards(1, 24 * GIB))["stages"]["kd"]
    chosen = stage["settings"]
    packs = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    assert chosen["pack_tokens"] * packs == 4 * 4096
    assert sum(stage["terms"].values()) == stage["total_bytes"] <= 24 * GIB


def test_advice_given_as_options_makes_the_recipe_fit_as_written():
    from shared.recipe.override import apply_override

    wanted = recipe("8B", QLORA, {"bf16": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1})
    stage = plan_card(wanted, Cards(1, 16 * GIB))["stages"]["kd"]
    assert not stage["as_written_fits"]
    document = wanted.model_dump(mode="json")
    for option in stage["set"]:
        apply_override(document, option)
    again = plan_card(Recipe.model_validate(document), Cards(1, 16 * GIB))["stages"]["kd"]
    assert again["as_written_fits"]
    assert again["set"] == []
    assert again["total_bytes"] == stage["total_bytes"] == again["as_written_bytes"]


def test_card_too_small_for_kept_activations_recomputes_them_and_a_larger_one_keeps_them():
    wanted = recipe("1.7B", {"dtype": "bfloat16"}, {"optim": "adamw_8bit"})
    small, large = (plan_card(wanted, Cards(1, size * GIB))["stages"]["kd"]["settings"] for size in (17, 80))
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
        plan_card(recipe(size, student, trainer), Cards(1, gib * GIB))


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


def test_what_is_advised_where_all_fits_says_what_for():
    few = recipe("0.6B", {}, {"bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    for card, said in ((80, "fits too; the fastest that fits, shown here: --set"), (None, "does not fit; use --set")):
        fit = plan_card(few, Cards(1, (card or 80) * GIB))
        stage = fit["stages"]["kd"]
        assert stage["set"] and stage["as_written_fits"]
        text = card_text({**fit, "stages": {"kd": {**stage, "as_written_fits": card is not None}}})
        assert f"GiB as written, which {said}" in text


def test_unknown_student_is_refused_and_stated_sizes_are_named():
    stated = plan_card(recipe("0.6B", {}, {"bf16": True}), Cards(1, 24 * GIB))
    assert "assume.student" in card_text(stated)
    bare = recipe("0.6B").model_copy(update={"assume": Recipe.model_fields["assume"].default})
    with pytest.raises(
        TrainingError, match=r"config of the student '\./not-here' cannot be loaded: .*assume\.student\.config"
    ):
        plan_card(bare, Cards(1, 24 * GIB))


def test_size_of_a_card_is_read_with_its_unit_or_refused():
    assert read_cards("24GiB") == Cards(1, 24 * GIB)
    assert read_cards("2x24GiB") == read_cards("2 x 24 GiB") == Cards(2, 24 * GIB)
    for wrong in ("24", "0GiB", "a lot", "24 gib", "0x24GiB", "x24GiB", "2x", "9" * 400 + "GiB", "\u0661GiB"):
        with pytest.raises(UsageError, match="expected one such as 24GiB"):
            read_cards(wrong)


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
    text = card_text(plan_card(wanted, Cards(1, card * GIB)))
    assert "learning rate 2e-05 moves 30% of them" in text
    (line,) = (line for line in text.splitlines() if "fit this card" in line)
    assert way in line
    trained = dict(re.findall(r"--set stages\.kd\.trainer\.(\w+)=(\S+)", line))
    student = dict(re.findall(r"--set student\.(\w+)=(\S+)", line))
    changed = recipe("1.7B", {"gradient_checkpointing": True, "dtype": "bfloat16"} | student, EIGHT | trained)
    assert "moves 30%" not in card_text(plan_card(changed, Cards(1, card * GIB))), "the advice works"


SHARDS = {"fsdp": "full_shard", "optim": "adamw_torch_fused", "bf16": True}


def test_shards_fit_on_two_cards_what_one_does_not_hold_and_the_text_says_so():
    whole = recipe("1.7B", {}, {**SHARDS, "fsdp": "none"})
    with pytest.raises(TrainingError, match=r"where each of 2 cards has 24.0 GiB; set fsdp: full_shard \(\d"):
        plan_card(whole, Cards(2, 24 * GIB))
    fit = plan_card(recipe("1.7B", {}, SHARDS), Cards(2, 24 * GIB))
    assert fit["stages"]["kd"]["total_bytes"] <= 24 * GIB
    text = card_text(fit)
    assert "on each of 2 cards of 24.0 GiB" in text
    assert "one process per card: shards over 2 processes (kd)" in text
    assert "one device holds all weights" not in text


def test_data_parallel_holds_everything_and_a_second_copy_of_gradients():
    wanted = recipe("0.6B", {}, {"bf16": True})
    alone, together = (plan_card(wanted, Cards(count, 80 * GIB))["stages"]["kd"] for count in (1, 2))
    assert together["terms"]["weights"] == alone["terms"]["weights"]
    assert together["terms"]["gradients"] == pytest.approx(alone["terms"]["gradients"] + PARAMETERS["0.6B"] * 4)
    assert "everything on each of 2 cards, gradients twice (kd)" in card_text(plan_card(wanted, Cards(2, 80 * GIB)))


@pytest.mark.parametrize(
    ("student", "trainer", "cards", "said"),
    [
        ({}, {}, 1, "in a single process, where there is nothing to shard over.*; plan several cards with --card 2x24"),
        (QLORA, {}, 2, "4-bit weights cannot be sharded"),
        ({}, {"optim": "adamw_8bit"}, 2, "does not work on shards of weights"),
    ],
)
def test_plan_refuses_the_shards_that_training_refuses(student, trainer, cards, said):
    wanted = recipe("0.6B", student, {"fsdp": "full_shard", **trainer})
    with pytest.raises(TrainingError, match=f"^stage 'kd': .*{said}"):
        plan_card(wanted, Cards(cards, 24 * GIB))


@pytest.mark.parametrize(("optim", "more"), [("adamw_torch_fused", True), ("adafactor", False)])
def test_more_cards_are_proposed_only_where_training_would_shard(optim, more):
    wanted = recipe("70B", {"dtype": "bfloat16", "adapter": "lora"}, {"optim": optim, "pack_tokens": 1024})
    with pytest.raises(TrainingError) as refused:
        plan_card(wanted, Cards(1, 24 * GIB))
    assert ("train with fsdp: full_shard on" in str(refused.value)) is more


HIDDEN = {
    "teacher": {"model": "./no-teacher"},
    "capture": {"hidden": {"layers": 3, "pooled": "mean", "attention": {"layers": 2, "strongest": 16}}},
}
ON_HIDDEN = [{"name": "forward_kl"}, {"name": "hidden"}, {"name": "attention"}, {"name": "contrastive"}]


def hidden_recipe(losses=ON_HIDDEN, **trainer) -> Recipe:
    built = recipe("0.6B", {}, {"bf16": True, **trainer}, losses=losses).model_dump(mode="json", exclude_unset=True)
    built["assume"]["teacher"] = {"config": {"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096}}
    return Recipe.model_validate({**built, **HIDDEN})


def test_losses_on_a_hidden_layer_add_projections_states_and_attention():
    def of(losses, name="as_written_bytes"):
        return plan_card(hidden_recipe(losses), Cards(1, 80 * GIB))["stages"]["kd"][name]

    plain, states, every = of(ON_HIDDEN[:1]), of(ON_HIDDEN[:2]), of(ON_HIDDEN)
    assert states - plain > 3 * 1024 * 4096 * 4 * 4, "weights, gradients and two states of three projections"
    assert states < every
    with pytest.raises(TrainingError, match="need the student whole"):
        plan_card(hidden_recipe(fsdp="full_shard"), Cards(2, 80 * GIB))


def test_hidden_layer_of_unknown_size_is_refused():
    bare = recipe("0.6B", {}, {}, losses=ON_HIDDEN)
    with pytest.raises(TrainingError, match=r"hidden layer that stage 'kd' reads has unknown sizes: .*add capture"):
        plan_card(bare, Cards(1, 80 * GIB))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bytes_of_shards_fall_with_the_processes_but_never_below_the_root_group(adapter):
    built = recipe("0.6B", {"adapter": adapter}, {**SHARDS, "pack_tokens": 512, "operator_chunk_mib": 64})
    student, trainer = built.student, built.stages[0].trainer
    found = [
        estimate_memory(shape(), student, trainer, context=StepContext(count), recomputes=True)
        for count in (2, 4, 8, 64, 4096)
    ]
    totals = [estimate.allocated for estimate in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] > shape().num_embedding_parameters * 4
    whole = estimate_memory(shape(), student, trainer.model_copy(update={"fsdp": "none"}), recomputes=True)
    assert totals[0] < whole.allocated
    assert found[0].optimizer == pytest.approx(2 * found[1].optimizer, abs=4)

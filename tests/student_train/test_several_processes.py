"""Processes that train together compute what one computes alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket

import pytest
import torch

from shared.errors import TrainingError, UsageError
from student_train.batch.collate import collate
from student_train.batch.dataset import PackDataset
from student_train.records.metrics_log import read_steps
from student_train.records.processes import is_first, num_processes
from student_train.stage.stage_work import resolve_stage
from student_train.stage.stages import run_stages


def _train_as(rank: int, port: int, settings: dict[str, str], recipe: dict) -> None:
    from shared.recipe.recipe import Recipe

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **settings,
    }
    torch.set_num_threads(1)
    run_stages(Recipe.model_validate(recipe))
    torch.distributed.destroy_process_group()


def train_with_two(recipe, settings=None):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.student_train.preload"])
    document = recipe.model_dump(mode="json")
    ranks = [context.Process(target=_train_as, args=(rank, port, settings or {}, document)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    for process in ranks:
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in ranks]


def by_steps(recipe, name="kd"):
    return read_steps(recipe.output_dir / "train" / name / "metrics.jsonl")


def assert_same_training(alone, together):
    from safetensors.torch import load_file

    for one, two in zip(by_steps(alone), by_steps(together), strict=True):
        assert (one["positions"], one["tokens"], one["step"]) == (two["positions"], two["tokens"], two["step"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    weights = [load_file(recipe.output_dir / "train/kd/model/model.safetensors") for recipe in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["none", "full_shard"])
@pytest.mark.parametrize(
    "student",
    [
        pytest.param({}, id="tied"),
        pytest.param({"model": "llama", "gradient_checkpointing": True}, id="untied-recomputed"),
        pytest.param({"adapter": "lora"}, id="lora"),
    ],
)
def test_two_processes_equal_one_of_the_same_global_batch(recipe_of, tiny, student, fsdp):
    """`none` is data parallel, `full_shard` FSDP2; clipping is always active, so that a wrong norm would show."""
    common = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "save_steps": 2, "max_grad_norm": 0.1}
    if "model" in student:
        student = {**student, "model": str(getattr(tiny, student["model"]))}
    alone = recipe_of(student=student, trainer={**common, "per_device_train_batch_size": 4})
    alone = alone.model_copy(update={"output_dir": alone.output_dir.with_name("alone")})
    run_stages(alone)
    assert min(step["grad_norm"] for step in by_steps(alone)) > 0.1
    together = recipe_of(student=student, trainer={**common, "gradient_accumulation_steps": 2, "fsdp": fsdp})
    assert train_with_two(together) == [0, 0]
    assert_same_training(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["none", "full_shard"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_last_step_of_fewer_packs_than_processes_trains_on_no_pack_twice(recipe_of, batch, fsdp):
    """The data loader of several processes would fill its last batches with the first packs again."""
    common = {"max_steps": None, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.1, "pack_tokens": 128}
    common |= {"per_device_train_batch_size": batch}
    alone = recipe_of(trainer={**common, "gradient_accumulation_steps": 2 * 2 // batch})
    alone = alone.model_copy(update={"output_dir": alone.output_dir.with_name("alone")})
    assert resolve_stage(alone, alone.stages[0]).plan.num_packs % 2, "a pack for each would hide the repeated one"
    run_stages(alone)
    together = recipe_of(trainer={**common, "gradient_accumulation_steps": 2 // batch, "fsdp": fsdp})
    assert train_with_two(together) == [0, 0]
    assert_same_training(alone, together)


def test_packs_that_fill_the_last_pass_hold_no_position(recipe_of):
    work = resolve_stage(recipe := recipe_of(trainer={"max_steps": 3}), recipe.stages[0])
    data = PackDataset(work.caches, work.plan, work.temperatures, packs_per_pass=4)
    assert len(PackDataset(work.caches, work.plan, work.temperatures)) == 3
    assert len(data) == 4
    filler = data[3]
    assert (len(filler["input_ids"]), len(filler["labels"]), len(filler["support_counts"])) == (1, 0, 0)
    joined, alone = collate([data[2], filler]), collate([data[2]])
    assert all(torch.equal(joined[name], alone[name]) for name in alone if name not in ("input_ids", "position_ids"))
    assert torch.equal(joined["input_ids"][:, :-1], alone["input_ids"])


@pytest.mark.slow
def test_evaluations_over_shards_are_those_of_one_process_and_the_best_is_loaded(recipe_of):
    evaluate = {"every_steps": 1, "rows_per_source": 4, "samples": 1, "sample_tokens": 4, "keep_best": True}
    common = {"max_steps": 3, "optim": "sgd", "learning_rate": 5.0, "save_steps": 50, "max_grad_norm": 1.0}
    alone = recipe_of(trainer={**common, "per_device_train_batch_size": 2}, evaluate=evaluate)
    alone = alone.model_copy(update={"output_dir": alone.output_dir.with_name("alone")})
    run_stages(alone)
    together = recipe_of(trainer={**common, "fsdp": "full_shard"}, evaluate=evaluate)
    assert train_with_two(together) == [0, 0]
    logs = [read_steps(recipe.output_dir / "train/kd/evaluations.jsonl") for recipe in (alone, together)]
    assert [step["kl_nats"] for step in logs[0]] == pytest.approx([step["kl_nats"] for step in logs[1]], rel=1e-5)
    assert min(logs[0], key=lambda step: step["kl_nats"])["step"] < 3, (
        "the best is not the last, so that it has to be loaded"
    )
    assert_same_training(alone, together)


@pytest.mark.slow
def test_killed_run_over_shards_goes_on_to_the_same_bytes_with_whole_checkpoints(recipe_of):
    trainer = {"max_steps": 4, "save_steps": 2, "weight_decay": 0.01, "fsdp": "full_shard"}
    recipe = recipe_of(trainer=trainer)
    whole = recipe.model_copy(update={"output_dir": recipe.output_dir.with_name("whole")})
    assert train_with_two(whole) == [0, 0]
    assert train_with_two(recipe, {"DECANT_FAILPOINT": "train_step.after_write@3"}) == [-signal.SIGKILL] * 2
    checkpoint = recipe.output_dir / "train/kd/checkpoint-2"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    (model, _), shapes = (load_whole(checkpoint), {tuple(own["exp_avg"].shape) for own in state.values()})
    assert shapes == {tuple(parameter.shape) for parameter in model.parameters()}, "a checkpoint holds whole tensors"
    assert train_with_two(recipe) == [0, 0]
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (recipe.output_dir / "train/kd" / name).read_bytes() == (
            whole.output_dir / "train/kd" / name
        ).read_bytes()


def load_whole(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)


@pytest.mark.parametrize(
    ("trainer", "student", "said"),
    [
        ({}, {}, "in a single process, where there is nothing to shard over"),
        ({"optim": "adafactor"}, {}, r"trainer.optim adafactor does not work on shards .* choose one of adamw_torch"),
        ({}, {"adapter": "qlora"}, "4-bit weights cannot be sharded"),
        ({"torch_compile": True}, {}, "torch_compile is not supported together with trainer.fsdp"),
    ],
    ids=["alone", "optimizer", "qlora", "compile"],
)
def test_what_cannot_be_sharded_is_refused(recipe_of, monkeypatch, trainer, student, said):
    from student_train.train.sharding import check_sharding

    recipe = recipe_of(student=student, trainer={"fsdp": "full_shard", **trainer})
    if "single process" not in said:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=said):
        check_sharding(recipe.student, recipe.stages[0].trainer)


@pytest.mark.parametrize(
    "name, value, trainer, instead",
    [
        ("ACCELERATE_USE_FSDP", "true", {}, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_USE_DEEPSPEED", "1", {}, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", {}, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}, "set trainer.bf16 or trainer.fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", {"bf16": True}, "set trainer.bf16 or trainer.fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "set trainer.torch_compile"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": True}, None),
        ("ACCELERATE_MIXED_PRECISION", "no", {"bf16": True}, None),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", {}, None),
        ("ACCELERATE_USE_FSDP", "false", {}, None),
    ],
)
def test_a_launcher_that_asks_for_something_else_than_the_recipe_is_refused(
    recipe_of, monkeypatch, name, value, trainer, instead
):
    from student_train.train.sharding import check_sharding

    monkeypatch.setenv(name, value)
    recipe = recipe_of(trainer=trainer)
    if instead is None:
        check_sharding(recipe.student, recipe.stages[0].trainer)
        return
    with pytest.raises(
        TrainingError, match=f"^the launcher asks for {name}={value}; unset it or start with torchrun, and {instead}$"
    ):
        check_sharding(recipe.student, recipe.stages[0].trainer)


def test_a_rank_that_no_launcher_gave_is_that_of_a_process_that_trains_alone_and_writes(recipe_of, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "5")
    recipe = recipe_of()
    run_stages(recipe)
    assert [row["step"] for row in by_steps(recipe)] == [1, 2, 3, 4, 5, 6]
    written = {path.name for path in recipe.stage_dir("kd").iterdir()}
    assert written >= {"model", "done.json", "identity.json", "timing.jsonl", "checkpoint-6"}


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "9" * 20, "\u0662"])
def test_a_number_of_processes_that_is_none_is_refused_in_a_sentence(monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{name}=.* is no number of processes that train together; start several"):
        is_first()
    monkeypatch.setenv("WORLD_SIZE", "")
    assert (num_processes(), is_first()) == (1, True)

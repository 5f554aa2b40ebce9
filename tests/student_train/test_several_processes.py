"""Processes that train together compute what one computes alone."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch

from student_train.metrics_log import read_steps
from student_train.stages import run_stages


def _train_as(rank: int, port: int, settings: dict[str, str], recipe: dict) -> None:
    from shared.recipe import Recipe

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


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        pytest.param({}, "none", id="data-parallel"),
        pytest.param({}, "lora", id="lora"),
        pytest.param(
            SHARDED,
            "none",
            id="fsdp2",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards on GPUs only"),
        ),
    ],
)
def test_two_processes_equal_one_of_the_same_global_batch(recipe_of, settings, adapter):
    from safetensors.torch import load_file

    common = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "save_steps": 2}
    student = {"adapter": adapter}
    alone = recipe_of(student=student, trainer={**common, "per_device_train_batch_size": 4})
    alone = alone.model_copy(update={"output_dir": alone.output_dir.with_name("alone")})
    run_stages(alone)
    together = recipe_of(student=student, trainer={**common, "gradient_accumulation_steps": 2})
    assert train_with_two(together, settings) == [0, 0]
    checkpoint = together.output_dir / "train/kd/checkpoint-2"
    assert any("fsdp" in path.name for path in checkpoint.iterdir()) == bool(settings), "sharded where it should be"
    logs = [read_steps(recipe.output_dir / "train/kd/metrics.jsonl") for recipe in (alone, together)]
    for one, two in zip(*logs, strict=True):
        assert (one["positions"], one["tokens"], one["step"]) == (two["positions"], two["tokens"], two["step"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    weights = [load_file(recipe.output_dir / "train/kd/model/model.safetensors") for recipe in (alone, together)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)

"""The arithmetic against bytes counted in one of two processes that really train, and in one with losses on a hidden
layer.
"""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from shared.identity.hidden_identity import HiddenIdentity
from shared.recipe.recipe import Stage, StageTrainer, Student
from student_train.fit.memory import StepContext, estimate_memory
from tests.student_train.counted_bytes import ROW_TOKENS, counted_step

STORED_WIDTH, STRONGEST = 256, 8


def _count_as(rank, store, student_settings, trainer_settings, found):
    from torch.nn.parallel import DistributedDataParallel

    from student_train.train.sharding import shard

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student, trainer = settings(student_settings, trainer_settings)

    def spread(model, base):
        if trainer.fsdp == "none":
            return DistributedDataParallel(model)
        shard(model, base, torch.device("cpu"))
        return model

    found.put(counted_step(student, trainer, spread=spread))
    torch.distributed.destroy_process_group()


def settings(student_settings, trainer_settings):
    return (
        Student.model_validate({"model": "m", **student_settings}),
        StageTrainer.model_validate({"pack_tokens": 768, "operator_chunk_mib": 1, **trainer_settings}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["none", "full_shard"])
@pytest.mark.parametrize(
    ("student_settings", "trainer_settings"),
    [
        ({}, {"pack_tokens": 128}),
        ({}, {"bf16": True, "gradient_checkpointing": True}),
        ({"dtype": "bfloat16", "adapter": "lora"}, {"bf16": True}),
    ],
    ids=str,
)
def test_estimate_of_one_of_two_processes_is_within_10_percent(tmp_path, student_settings, trainer_settings, fsdp):
    trainer_settings = {**trainer_settings, "fsdp": fsdp}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.student_train.preload"])
    found = context.SimpleQueue()
    arguments = (str(tmp_path / "store"), student_settings, trainer_settings, found)
    ranks = [context.Process(target=_count_as, args=(rank, *arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    student, trainer = settings(student_settings, trainer_settings)
    for counted, shape in (found.get(), found.get()):
        estimate = estimate_memory(shape, student, trainer, context=StepContext(2), has_wide_products=False)
        assert estimate.allocated == pytest.approx(counted, rel=0.10), f"{estimate.moment}: {estimate.terms()}"


def hidden_identity():
    return HiddenIdentity(
        teacher="t",
        weights_hash="",
        tokenizer_hash="",
        num_layers=10,
        width=STORED_WIDTH,
        layers=(2, 6, 10, -1),
        pooled="mean",
        attention_layers=(4, 8),
        strongest=STRONGEST,
    )


def hidden_batch(tokens):
    rows = tokens // 128
    reach = torch.arange(tokens)[:, None, None] % 128
    distances = torch.arange(STRONGEST).expand(tokens, 2, STRONGEST)
    return {
        "states_integers": torch.randint(-127, 128, (tokens, 4, STORED_WIDTH), dtype=torch.int8),
        "states_scales": torch.rand(tokens, 4),
        "attention_distances": torch.where(distances <= reach, distances, -1).to(torch.int32),
        "attention_codes": torch.full((tokens, 2, STRONGEST), 1000, dtype=torch.int32),
        "pooled_integers": torch.randint(-127, 128, (rows, STORED_WIDTH), dtype=torch.int8),
        "pooled_scales": torch.rand(rows),
        "pooled_row": torch.arange(tokens) // 128,
    }


CASES = [
    ([{"name": "hidden"}], {}, {"bf16": True}),
    ([{"name": "hidden", "metric": "cosine"}, {"name": "contrastive"}], {"dtype": "bfloat16"}, {}),
    ([{"name": "attention"}], {}, {"bf16": True, "gradient_checkpointing": True}),
    ([{"name": "hidden"}, {"name": "attention"}], {"dtype": "bfloat16", "adapter": "lora"}, {"bf16": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("losses", "student_settings", "trainer_settings"), CASES, ids=str)
def test_estimate_with_losses_on_a_hidden_layer_is_within_10_percent(losses, student_settings, trainer_settings):
    from student_train.batch.stage_terms import terms_at
    from student_train.layers.layer_losses import LayerLosses

    stage = Stage.model_validate({"losses": losses, "trainer": {"optim": "adamw_torch"}, "name": "kd"})
    student, trainer = settings(student_settings, trainer_settings)
    identity = hidden_identity()
    counted, shape = counted_step(
        student,
        trainer,
        layers=lambda base: LayerLosses(base, stage.losses, identity, seed=0),
        terms=terms_at(stage, 0, 1),
        hidden_batch=hidden_batch(trainer.pack_tokens),
    )
    context = StepContext(losses=stage.losses, hidden=identity, max_length=ROW_TOKENS)
    estimate = estimate_memory(shape, student, trainer, context=context, has_wide_products=False)
    plain = estimate_memory(shape, student, trainer, has_wide_products=False)
    assert estimate.allocated == pytest.approx(counted, rel=0.10), f"{estimate.moment}: {estimate.terms()}"
    assert estimate.allocated > plain.allocated

"""What a stage's steps compute, against dense float64 maths and against each other."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
import torch

from shared.errors import IdentityError, TrainingError, UsageError
from shared.recipe.sections.optimizers import OPTIMIZERS, Optimizer
from student_train.batch.dataset import CacheList
from student_train.batch.stage_terms import terms_at
from student_train.records.metrics_log import read_steps
from student_train.stage.stage_work import resolve_stage
from student_train.stage.stages import run_stages


def metrics(recipe, name="kd"):
    return read_steps(recipe.output_dir / "train" / name / "metrics.jsonl")


def weights(recipe, name="kd"):
    from safetensors.torch import load_file

    return load_file(recipe.output_dir / "train" / name / "model" / "model.safetensors")


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def dense_losses(model, rows, temperature, vocab_size=512):
    """Return summed (tail-bucket KL x T^2, cross-entropy) and positions; each row alone, full softmaxes in float64."""
    divergence = entropy = positions = 0
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, row.predictor_index(), :vocab_size].double()
        labels = torch.from_numpy(row.labels().astype(np.int64))
        entropy += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        positions += len(labels)
        targets = row.targets
        column, offsets = targets.temperatures.index(temperature), targets.offsets()
        q = (logits / temperature).softmax(-1).numpy()
        for s in range(len(labels)):
            head = slice(offsets[s], offsets[s + 1])
            scaled = np.exp(targets.logprobs[head].astype(np.float64) / temperature)
            tail = np.exp(np.float64(targets.tail_logmass[s, column]))
            p = scaled / scaled.sum() * (1 - tail)
            q_head = q[s, targets.ids[head]]
            value = (p * np.log(p / q_head)).sum() + (tail * np.log(tail / (1 - q_head.sum())) if tail > 0 else 0)
            divergence += temperature**2 * value
    return divergence, entropy, positions


@pytest.mark.parametrize("family", ["qwen3", "llama", "padded"])
def test_first_step_equals_dense_float64_on_rows_alone(recipe_of, tiny, family):
    losses = [{"name": "forward_kl", "weight": 0.7, "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.3}]
    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    recipe = recipe_of(losses=losses, trainer=trainer, student={"model": str(getattr(tiny, family))})
    run_stages(recipe)
    work = resolve_stage(recipe, recipe.stages[0])
    rows = [work.caches[int(row)] for pack in range(4) for row in work.plan.rows_of(pack)]
    divergence, entropy, positions = dense_losses(load(getattr(tiny, family)), rows, 2.0)
    (step,) = metrics(recipe)
    assert step["positions"] == positions
    assert step["tokens"] == sum(len(row.token_ids) for row in rows)
    assert step["terms"]["forward_kl"] == pytest.approx(divergence / positions, rel=2e-5)
    assert step["terms"]["cross_entropy"] == pytest.approx(entropy / positions, rel=2e-5)
    assert step["loss"] == pytest.approx((0.7 * divergence + 0.3 * entropy) / positions, rel=2e-5)


@pytest.mark.slow
def test_batch_of_four_equals_four_accumulated_batches(recipe_of, tmp_path):
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        recipe = recipe_of(trainer=trainer).model_copy(update={"output_dir": tmp_path / f"batch{batch}"})
        run_stages(recipe)
        runs.append((metrics(recipe), weights(recipe)))
    (one, one_weights), (four, four_weights) = runs
    assert len({step["positions"] for step in one}) > 1, "steps of equal size would hide a wrong denominator"
    for left, right in zip(one, four, strict=True):
        assert left["positions"] == right["positions"]
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-6)
    for name, weight in one_weights.items():
        torch.testing.assert_close(weight, four_weights[name], rtol=0, atol=1e-6)


def test_stages_with_the_same_arguments_see_the_same_packs(recipe_of):
    sft = recipe_of(name="sft", losses=[{"name": "cross_entropy"}])
    kd = recipe_of(name="kd")
    assert resolve_stage(sft, sft.stages[0]).plan.hash == resolve_stage(kd, kd.stages[0]).plan.hash
    other = recipe_of(trainer={"seed": 1})
    assert resolve_stage(other, other.stages[0]).plan.hash != resolve_stage(kd, kd.stages[0]).plan.hash


def test_held_out_prompts_are_in_no_pack(recipe_of):
    from shared.keys import is_heldout

    recipe = recipe_of(trainer={"max_steps": 20})
    recipe = type(recipe).model_validate({**recipe.model_dump(mode="json"), "heldout": {"fraction": 0.3}})
    work = resolve_stage(recipe, recipe.stages[0])
    drawn = {int(row) for pack in range(work.plan.num_packs) for row in work.plan.rows_of(pack)}
    held = {i for i in range(len(work.caches)) if is_heldout(work.caches[i].group_key, 0.3)}
    assert held
    assert drawn == set(range(len(work.caches))) - held


def test_schedules_and_exact_values_reach_the_step_log(recipe_of):
    losses = [
        {
            "name": "forward_kl",
            "weight": {"kind": "linear", "start": 1.0, "end": 0.0},
            "temperature": {"kind": "step", "values": [2.0, 1.0], "at": [0.5]},
        },
        {"name": "cross_entropy", "weight": {"kind": "linear", "start": 0.0, "end": 1.0}},
    ]
    recipe = recipe_of(losses=losses, trainer={"max_steps": 5})
    run_stages(recipe)
    steps = metrics(recipe)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for i, step in enumerate(steps):
        weight = 1 - i / 4
        expected = weight * step["terms"]["forward_kl"] + (1 - weight) * step["terms"]["cross_entropy"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    assert [terms_at(recipe.stages[0], i, 5)[0].temperature for i in range(5)] == [2.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.slow
def test_distillation_lowers_held_out_divergence(recipe_of, tiny):
    recipe = recipe_of(losses=[{"name": "forward_kl"}], trainer={"max_steps": 40, "learning_rate": 1e-2})
    run_stages(recipe)
    work = resolve_stage(recipe, recipe.stages[0])
    training = set(work.caches.training_rows(0.1).tolist())
    rows = [work.caches[i] for i in range(len(work.caches)) if i not in training]
    before, _, positions = dense_losses(load(tiny.qwen3), rows, 1.0)
    after, _, _ = dense_losses(load(recipe.output_dir / "train/kd/model"), rows, 1.0)
    assert positions > 20
    assert after < 0.7 * before


@pytest.mark.slow
def test_two_caches_and_draws_train_together_when_captured_alike(recipe_of, tiny):
    labels_only = recipe_of(
        cache=[tiny.cache, tiny.drawn, tiny.unscored],
        losses=[{"name": "cross_entropy"}],
        trainer={"num_train_epochs": 1.0, "max_steps": None},
    )
    work = resolve_stage(labels_only, labels_only.stages[0])
    assert len(work.caches) == 80
    assert set(work.caches.source_names) == {"math", "ops", "extra"}
    for index in (0, 47, 48, 63, 64, 79):
        which, local = (0, index) if index < 48 else (1, index - 48) if index < 64 else (2, index - 64)
        assert work.caches[index].key == work.caches.caches[which][local].key
    run_stages(labels_only)
    drawn = recipe_of(cache=[tiny.drawn], name="drawn", trainer={"max_steps": 2})
    run_stages(drawn)
    assert metrics(drawn, "drawn")[-1]["terms"]["forward_kl"] > 0


@pytest.mark.slow
def test_workers_read_the_same_packs(recipe_of, tmp_path):
    logs = []
    for workers in (0, 2):
        recipe = recipe_of(trainer={"dataloader_num_workers": workers, "max_steps": 3}).model_copy(
            update={"output_dir": tmp_path / str(workers)}
        )
        run_stages(recipe)
        logs.append((recipe.output_dir / "train/kd/metrics.jsonl").read_bytes())
    assert logs[0] == logs[1]


def test_uncaptured_temperature_is_refused_before_a_model_is_loaded(recipe_of):
    recipe = recipe_of(losses=[{"name": "forward_kl", "temperature": 3.0}], student={"model": "nowhere/at-all"})
    with pytest.raises(TrainingError, match=r"temperature 3, which was not captured \(captured: 1, 2\)"):
        run_stages(recipe)


def test_divergence_without_a_layer_is_refused(recipe_of, tiny):
    from shared.errors import CacheError

    with pytest.raises(CacheError, match="no targets layer"):
        run_stages(recipe_of(cache=[tiny.unscored]))


def test_caches_of_two_tokenizers_are_refused(tiny, tmp_path):
    from tests.student_train.tiny_caches import make_cache

    altered = json.loads((tiny.teacher / "tokenizer.json").read_bytes())
    altered["model"]["merges"].reverse()
    other = make_cache(tmp_path / "other", tiny.teacher, num_rows=2, tokenizer_bytes=json.dumps(altered).encode())
    with pytest.raises(IdentityError, match=r"has tokenizer .* and .* has"):
        CacheList.open([tiny.cache, other], None)


def test_unknown_source_in_a_mixture_is_refused(recipe_of):
    with pytest.raises(TrainingError, match=r"source 'maths', which no cache has \(they have math, ops\)"):
        run_stages(recipe_of(mixture={"maths": 1.0}))


def test_unknown_or_swapped_stage_names_are_refused(recipe_of):
    with pytest.raises(UsageError, match="stage 'sft' is not in the recipe, which has kd"):
        run_stages(recipe_of(), from_stage="sft")


def test_loss_that_is_not_finite_stops_the_stage_and_its_health(recipe_of):
    recipe = recipe_of(trainer={"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd"})
    with pytest.raises(TrainingError, match=r"step \d: the (loss|gradient's norm) is (nan|inf)"):
        run_stages(recipe)
    health = json.loads((recipe.output_dir / "train/kd/health.json").read_text())
    assert not health["healthy"]
    assert not health["checks"]["not_diverged"]
    assert re.search("is (nan|inf)", health["stopped"])
    assert not health["checks"]["model_saved"]


def test_stage_whose_rows_are_all_cut_before_what_is_trained_is_refused(recipe_of, capsys):
    recipe = recipe_of(max_length=2)
    with pytest.raises(TrainingError, match=r"'kd' has nothing to train on: all of its .* rows are cut to 2 tokens"):
        run_stages(recipe)
    assert not recipe.stage_dir("kd").exists()
    caches = CacheList.open(recipe.cache, None)
    firsts = sorted(int(caches[i].spans[0, 0]) for i in range(len(caches)))
    middle = firsts[len(firsts) // 2]
    work = resolve_stage(one := recipe_of(max_length=middle, trainer={"max_steps": 100}), one.stages[0])
    trained = {int(row) for epoch in work.plan.epochs for row in epoch.rows}
    assert 0 < work.num_unlabelled < len(trained)
    assert work.num_unlabelled == sum(int(caches[row].spans[0, 0]) >= middle for row in trained)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"optim": "adamw_8bit"}, "trainer.optim is adamw_8bit, which needs the package bitsandbytes"),
        ({"optim": "adamw_torch_4bit"}, "trainer.optim is adamw_torch_4bit, which needs the package torchao"),
        ({"optim": "schedule_free_adamw"}, "which needs the package schedulefree"),
        ({"report_to": "wandb"}, "report_to names wandb, which is not installed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "trainer.lr_scheduler_type .* cannot be used"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"mim_lr": 0.1}},
            "trainer.lr_scheduler_type .* cannot be used",
        ),
        ({"fp16": True}, "trainer.fp16 is set where there is no NVIDIA GPU"),
        ({"tf32": True}, "trainer.tf32 is set where there is no NVIDIA GPU"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an NVIDIA GPU")
def test_setting_that_cannot_be_honoured_is_refused_in_a_sentence(recipe_of, trainer, said):
    for package in ("bitsandbytes", "wandb", "torchao", "schedulefree"):
        if package in said and importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(TrainingError, match=said):
        run_stages(recipe_of(trainer=trainer))


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="for machines without torch_xla")
def test_an_optimizer_that_transformers_cannot_make_here_is_refused_by_its_name(recipe_of, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adamw_torch_xla", Optimizer(2))
    with pytest.raises(TrainingError, match=r"trainer\.optim adamw_torch_xla cannot be used: .*torch_xla"):
        run_stages(recipe_of(trainer={"optim": "adamw_torch_xla"}))

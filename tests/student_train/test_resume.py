"""A killed run goes on to the same bytes; what is half-written is never mistaken for whole; what no longer fits is
refused.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import DecantError, TrainingError
from shared.recipe.recipe import Recipe
from student_train.records import one_training
from student_train.records.checkpoints import MARKER, list_checkpoints, newest_checkpoint, remove_incomplete
from student_train.records.metrics_log import StepLog, read_steps
from student_train.stage.stages import run_stages
from tests.student_train.conftest import _train

PLAIN = {"trainer": {"gradient_accumulation_steps": 2, "max_steps": 8}, "mixture": {"math": 0.75, "ops": 0.25}}
LORA = {
    "student": {"adapter": {"kind": "lora", "r": 4, "dropout": 0.2}},
    "trainer": {"max_steps": 8, "learning_rate": 1e-2},
}


def outcome(recipe):
    directory = recipe.output_dir / "train/kd"
    names = ["metrics.jsonl", "model/model.safetensors", "model/config.json", "health.json"]
    return {name: (directory / name).read_bytes() for name in names}


def elsewhere(recipe, name):
    return recipe.model_copy(update={"output_dir": recipe.output_dir.with_name(name)})


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        pytest.param(PLAIN, ["train_step.after_write@5"], id="mixture-accumulation"),
        pytest.param(LORA, ["checkpoint.before_marker@2"], id="lora-dropout-in-a-checkpoint", marks=pytest.mark.slow),
        pytest.param(
            {},
            ["train_step.after_write@2", "checkpoint.before_rename", "export.before_write"],
            id="thrice",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_is_bitwise_equal_after_kill(recipe_of, run_apart, settings, places):
    recipe = recipe_of(**settings)
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    for place in places:
        assert run_apart(recipe, place) == -signal.SIGKILL
    assert run_apart(recipe, None) == 0
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))
    steps = read_steps(recipe.output_dir / "train/kd/timing.jsonl")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_a_second_training_of_a_stage_is_refused_while_the_first_lives_and_spoils_nothing(
    recipe_of, run_apart, monkeypatch, ends
):
    recipe = recipe_of(trainer={"max_steps": 8})
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    first = multiprocessing.get_context("forkserver").Process(
        target=_train, args=(recipe.model_dump(mode="json"), None)
    )
    first.start()
    log = recipe.output_dir / "train/kd/metrics.jsonl"
    while first.is_alive() and not (log.is_file() and log.read_bytes()):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    monkeypatch.setattr(one_training, "WAIT_SECONDS", 0.3)
    with pytest.raises(TrainingError, match=r"train/kd is trained by another process; let it end or stop it, then run"):
        run_stages(recipe)
    if ends == "killed":
        first.kill()
    os.kill(first.pid, signal.SIGCONT)
    first.join(timeout=240)
    assert first.exitcode == (0 if ends == "by itself" else -signal.SIGKILL)
    monkeypatch.undo()
    run_stages(recipe)
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))


def test_student_with_experts_resumes_with_its_experts(tiny, tmp_path, recipe_of, run_apart):
    """transformers writes experts one by one and keeps them together, so their names are not those of the file."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    directory = tmp_path / "student"
    shutil.copytree(tiny.qwen3, directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny.qwen3 / "tokenizer_config.json", directory)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=512, **sizes, **experts)).save_pretrained(directory)
    recipe = recipe_of(student={"model": str(directory)}, trainer={"max_steps": 4, "save_steps": 2})
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    assert run_apart(recipe, "train_step.after_write@3") == -signal.SIGKILL
    assert run_apart(recipe, None) == 0
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_resume_is_bitwise_equal_after_kills_at_random_places(recipe_of, run_apart, seed):
    chance = random.Random(seed)
    recipe = recipe_of(**chance.choice([PLAIN, LORA, {"trainer": {"max_steps": 8, "save_total_limit": 1}}]))
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    for _ in range(3):
        place = chance.choice(
            ["train_step.after_write", "checkpoint.before_marker", "checkpoint.after_rename", "metrics.before_rename"]
        )
        assert run_apart(recipe, f"{place}@{chance.randint(1, 4)}") in (-signal.SIGKILL, 0)
    assert run_apart(recipe, None) == 0
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))


@pytest.mark.slow
def test_finished_stage_is_reused_and_a_changed_one_refused(recipe_of, capfd):
    recipe = recipe_of(trainer={"max_steps": 2})
    run_stages(recipe)
    before = outcome(recipe)
    run_stages(recipe)
    assert "finished before with the same settings" in capfd.readouterr().err
    assert outcome(recipe) == before
    run_stages(recipe_of(trainer={"max_steps": 2, "save_steps": 50, "dataloader_num_workers": 1}))
    with pytest.raises(
        TrainingError,
        match=r"holds a finished stage with stage\.trainer\.learning_rate 0\.003 where .* 0\.1; remove or rename",
    ):
        run_stages(recipe_of(trainer={"max_steps": 2, "learning_rate": 0.1}))
    hotter = [{"name": "forward_kl", "weight": 0.9, "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.1}]
    with pytest.raises(TrainingError, match=r"stage\.losses\.0\.temperature"):
        run_stages(recipe_of(trainer={"max_steps": 2}, losses=hotter))
    for name, value in (("seed", 7), ("heldout", {"fraction": 0.3})):  # each moves the plan, too, and is what is told
        with pytest.raises(TrainingError, match=f"a finished stage with {name}"):
            run_stages(Recipe.model_validate(recipe.model_dump() | {name: value}))
    assert outcome(recipe) == before
    identity = recipe.output_dir / "train/kd/identity.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"plan": "of two processes"}))
    with pytest.raises(TrainingError, match=r"another number of processes \(now 1 process\); start as many as before"):
        run_stages(recipe)


def test_parts_that_are_not_built_yet_are_named_and_rows_that_came_since_refuse_a_finished_stage(tmp_path, capfd):
    whole, path = Path(__file__).parents[2] / "data/golden/run-1", tmp_path / "cache"
    shutil.copytree(whole / "cache", path)
    shutil.rmtree(path / "hidden")
    late = list(path.rglob("part-*-000001.*"))
    kept = {file: file.read_bytes() for file in late}
    stage = {"name": "a", "losses": [{"name": "cross_entropy"}], "trainer": {"max_steps": 1, "pack_tokens": 128}}
    student = {"model": str(whole / "student")}
    recipe = {"name": "a", "output_dir": str(tmp_path / "run"), "cache": str(path), "student": student}
    recipe = Recipe.model_validate({**recipe, "stages": [stage]})
    for file in late:
        file.unlink()
    run_stages(recipe)
    assert "without 1 planned parts of rows, which `decant teach` has not built yet" in capfd.readouterr().err
    for file, content in kept.items():
        file.write_bytes(content)
    with pytest.raises(TrainingError, match="holds a finished stage of other rows than its caches hold now; remove"):
        run_stages(recipe)
    shutil.rmtree(tmp_path / "run/train/a")
    run_stages(recipe)
    assert "planned parts" not in capfd.readouterr().err


def test_a_finished_stage_is_reused_once_another_layer_makes_it_name_its_own(recipe_of, tiny, tmp_path, capfd):
    path = tmp_path / "grows"
    shutil.copytree(tiny.cache, path)
    recipe = recipe_of(cache=[path], trainer={"max_steps": 1})
    run_stages(recipe)
    before, cache = outcome(recipe), Cache.open(path)
    other = replace(cache.layer, gap_step=cache.layer.gap_step / 2)
    tokenizer = {"tokenizer.json": (path / "tokenizer" / "tokenizer.json").read_bytes()}
    writer = CacheWriter.create_or_open(path, cache.sequences_identity, tokenizer)
    layer = LayerWriter.create_or_open(writer, "other", other, {})
    for record in writer.sequence_records():
        rows = [row for row in cache if row.key in {one.key for one in writer.read_sequences(record)}]
        layer.write(record.stem, [row.key for row in rows], [row.targets for row in rows], {})
    with pytest.raises(DecantError, match="name the one to use as `targets`"):
        run_stages(recipe)
    for named in (cache.layer_name, None):
        capfd.readouterr()
        if named is None:  # taken out again
            shutil.rmtree(layer.directory)
        run_stages(recipe_of(cache=[path], trainer={"max_steps": 1}, targets=named))
        assert "finished before with the same settings" in capfd.readouterr().err
        assert outcome(recipe) == before
        if named is not None:
            with pytest.raises(TrainingError, match=r"holds a finished stage with stage\.targets null"):
                run_stages(recipe_of(cache=[path], trainer={"max_steps": 1}, targets="other"))


@pytest.mark.parametrize("lost", ["removed", "cut short", "a shard of two"])
def test_a_finished_stage_whose_copy_lost_weights_is_no_longer_reused(recipe_of, capfd, lost):
    recipe = recipe_of()
    run_stages(recipe)
    whole = outcome(recipe)
    model = recipe.output_dir / "train/kd/model"
    weights, index = model / "model.safetensors", model / "model.safetensors.index.json"
    if lost == "cut short":
        os.truncate(weights, weights.stat().st_size // 2)
    elif lost == "removed":
        weights.unlink()
    else:
        names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        weights.rename(model / names[0])
        index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    capfd.readouterr()
    run_stages(recipe)
    said = capfd.readouterr().err
    assert "is not whole now and is made again" in said and "is reused" not in said
    assert outcome(recipe) == whole
    assert not index.exists()
    run_stages(recipe)
    assert "is reused" in capfd.readouterr().err


@pytest.mark.slow
def test_checkpoint_of_another_plan_or_cache_is_refused_with_both(recipe_of):
    recipe = recipe_of(trainer={"max_steps": 2})
    run_stages(recipe)
    directory = recipe.output_dir / "train/kd"
    (checkpoint,) = list_checkpoints(directory)
    with pytest.raises(
        TrainingError, match=f"made with cache {checkpoint.belongs_to['cache']} where this run has cache other"
    ):
        newest_checkpoint(directory, {**checkpoint.belongs_to, "cache": "other"})
    with pytest.raises(TrainingError, match="made with plan"):
        newest_checkpoint(directory, {**checkpoint.belongs_to, "plan": "other"})


def test_checkpoint_without_marker_is_removed_and_the_one_before_taken(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"plan": "p"}))
    (tmp_path / "checkpoint-10" / MARKER).unlink()
    assert newest_checkpoint(tmp_path, {"plan": "p"}).step == 9
    assert remove_incomplete(tmp_path) == [tmp_path / "checkpoint-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]


@pytest.mark.slow
def test_checkpoints_are_rotated_and_hold_no_pickled_arguments(recipe_of):
    recipe = recipe_of(trainer={"max_steps": 9, "save_total_limit": 2})
    run_stages(recipe)
    checkpoints = list_checkpoints(recipe.output_dir / "train/kd")
    assert [checkpoint.step for checkpoint in checkpoints] == [6, 9]
    assert not list(checkpoints[0].path.glob("training_args*"))


def test_step_log_is_cut_back_and_drops_a_torn_line(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": float("nan") if step == 2 else 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    StepLog(tmp_path / "metrics.jsonl", 99).close()
    assert [record["step"] for record in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    again = StepLog(tmp_path / "metrics.jsonl", 3)
    again.write({"step": 4})
    again.close()
    assert read_steps(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1 / 3},
        {"step": 4},
    ]


@pytest.mark.slow
def test_seconds_add_up_over_runs(recipe_of):
    recipe = recipe_of(trainer={"max_steps": 1})
    run_stages(recipe)
    first = json.loads((recipe.output_dir / "seconds.json").read_text())["train.kd"]
    shutil.rmtree(recipe.output_dir / "train")
    run_stages(recipe)
    assert json.loads((recipe.output_dir / "seconds.json").read_text())["train.kd"] > first > 0

"""A checkpoint that was altered after it was written is named and left, an older one is continued to the same model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from shared.errors import TrainingError
from student_train.records.checkpoints import MARKER, Checkpoint, damage, list_checkpoints, put_damaged_aside
from student_train.stage import stage_run
from student_train.stage.stages import run_stages

FILES = [
    "complete.json",
    "config.json",
    "gradient_watch.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def wrong_json(path: Path) -> None:
    path.write_text("[1, 2]")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    os.truncate(path, 2**42)


DAMAGES = [flip, cut, empty, grow, wrong_json, Path.unlink]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    from shared.recipe.recipe import Recipe

    run = tmp_path_factory.mktemp("trained") / "run"
    trainer = {"learning_rate": 3e-3, "max_steps": 6, "pack_tokens": 192, "save_steps": 2, "save_total_limit": None}
    losses = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(run),
            "cache": [str(tiny.cache)],
            "student": {"model": str(tiny.qwen3)},
            "stages": [{"name": "kd", "losses": losses, "trainer": {**trainer, "report_to": "none"}}],
        }
    )
    run_stages(recipe)
    return recipe


@pytest.fixture
def killed(trained, tmp_path):
    """The same run as if it had been killed before its model was saved, in a place of its own."""
    shutil.copytree(trained.output_dir, tmp_path / "run")
    stage = tmp_path / "run/train/kd"
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "model")
    return trained.model_copy(update={"output_dir": tmp_path / "run"})


def weights(recipe) -> bytes:
    return (recipe.output_dir / "train/kd/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_named_and_the_checkpoint_before_is_taken(killed, name, how):
    if name == MARKER and how in (Path.unlink, grow):
        pytest.skip("without a marker it is no checkpoint, and a space behind JSON is none of its content")
    stage = killed.output_dir / "train/kd"
    assert put_damaged_aside(stage) is None
    how(stage / "checkpoint-6" / name)
    told = put_damaged_aside(stage)
    assert told is not None
    assert told.startswith(str(stage / "checkpoint-6" / name))
    assert told.endswith(
        f"so checkpoint-6 was renamed to damaged-... and the training goes on from {stage / 'checkpoint-4'}"
    )
    assert [checkpoint.step for checkpoint in list_checkpoints(stage)] == [2, 4]
    assert (stage / "damaged-checkpoint-6").is_dir()


@pytest.mark.parametrize("how", [pipe, device, huge])
@pytest.mark.parametrize("name", ["optimizer.pt", MARKER])
def test_what_has_no_end_is_not_read(killed, name, how):
    stage = killed.output_dir / "train/kd"
    how(stage / "checkpoint-6" / name)
    if name != MARKER or how is huge:
        assert str(stage / "checkpoint-6" / name) in put_damaged_aside(stage)
    assert [checkpoint.step for checkpoint in list_checkpoints(stage)] == [2, 4]


@pytest.mark.parametrize("how", [pipe, device])
def test_what_has_no_end_is_not_read_of_a_checkpoint_without_checksums(killed, how):
    stage = killed.output_dir / "train/kd"
    for checkpoint in list_checkpoints(stage):
        (checkpoint.path / MARKER).write_text(json.dumps(dict(checkpoint.belongs_to)))
    how(stage / "checkpoint-6" / "optimizer.pt")
    assert f"{stage}/checkpoint-6/optimizer.pt is no file" in put_damaged_aside(stage)


@pytest.mark.parametrize("name", ["scaler.pt", "pytorch_model.bin", "default/adapter_model.safetensors"])
def test_file_that_was_not_written_with_a_checkpoint_is_named(killed, name):
    stage = killed.output_dir / "train/kd"
    (stage / "checkpoint-6" / ".DS_Store").write_bytes(b"of a file manager")
    assert put_damaged_aside(stage) is None
    (stage / "checkpoint-6" / name).parent.mkdir(exist_ok=True)
    shutil.copy(stage / "checkpoint-4" / "model.safetensors", stage / "checkpoint-6" / name)
    told = put_damaged_aside(stage)
    assert told.startswith(f"{stage / 'checkpoint-6' / name.split('/')[0]} was not written with the checkpoint; so")


@pytest.mark.parametrize("with_checksums", [True, False])
def test_checkpoint_under_the_name_of_another_step_is_left_and_the_model_is_the_same(trained, killed, with_checksums):
    stage = killed.output_dir / "train/kd"
    if not with_checksums:
        for checkpoint in list_checkpoints(stage):
            (checkpoint.path / MARKER).write_text(json.dumps(dict(checkpoint.belongs_to)))
    shutil.rmtree(stage / "checkpoint-6")
    shutil.copytree(stage / "checkpoint-2", stage / "checkpoint-6")
    run_stages(killed)
    assert (stage / "damaged-checkpoint-6").is_dir()
    assert weights(killed) == weights(trained)


def test_checkpoint_of_another_recipe_with_the_same_plan_is_refused(killed, tmp_path):
    (stage,) = killed.stages
    faster = stage.model_copy(update={"trainer": stage.trainer.model_copy(update={"learning_rate": 1e-2})})
    run_stages(killed.model_copy(update={"output_dir": tmp_path / "faster", "stages": (faster,)}))
    newest = tmp_path / "run/train/kd/checkpoint-6"
    for ours in (newest.with_name("checkpoint-4"), newest):
        shutil.rmtree(ours)
        shutil.copytree(tmp_path / "faster/train/kd" / ours.name, ours)
        with pytest.raises(TrainingError, match=f"{ours.name} was made by a stage of other settings than those in"):
            run_stages(killed)
        shutil.rmtree(ours)


@pytest.mark.parametrize(
    "name, how",
    [
        (MARKER, flip),
        pytest.param("model.safetensors", flip, marks=pytest.mark.slow),
        pytest.param("optimizer.pt", cut, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_an_intact_checkpoint_to_the_same_model_and_says_so(trained, killed, name, how, capfd):
    stage = killed.output_dir / "train/kd"
    for step in (4, 6):
        how(stage / f"checkpoint-{step}" / name)
    run_stages(killed)
    said = capfd.readouterr().err
    assert "checkpoint-6, checkpoint-4 was renamed" in said
    assert "continued after step 2" in said
    assert weights(killed) == weights(trained)
    assert all(damage(checkpoint) is None for checkpoint in list_checkpoints(stage))


@pytest.mark.slow
def test_stage_without_an_intact_checkpoint_is_refused_and_its_advice_works(trained, killed):
    stage = killed.output_dir / "train/kd"
    for step in (2, 4, 6):
        flip(stage / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(TrainingError, match=r"no checkpoint of .* can be continued") as error:
        run_stages(killed)
    words = str(error.value).split("remove ")[1].split(" to train")[0].split()
    assert len(words) == 3
    for word in words:
        shutil.rmtree(word)
    run_stages(killed)
    assert weights(killed) == weights(trained)


def test_checkpoint_that_is_needed_for_its_weights_must_be_intact_too(killed):
    stage = killed.output_dir / "train/kd"
    flip(stage / "checkpoint-4" / "model.safetensors")
    assert put_damaged_aside(stage, lambda step: None) is None
    told = put_damaged_aside(stage, lambda step: min(step, 4))
    assert "checkpoint-4/model.safetensors was altered" in told
    assert "so checkpoint-6, checkpoint-4 was renamed" in told


@pytest.mark.parametrize(
    "name, how",
    [
        ("trainer_state.json", cut),
        pytest.param("optimizer.pt", flip, marks=pytest.mark.slow),
        pytest.param("model.safetensors", cut, marks=pytest.mark.slow),
        pytest.param("config.json", empty, marks=pytest.mark.slow),
    ],
)
def test_checkpoint_of_a_version_without_checksums_is_continued_and_told_by_its_formats(trained, killed, name, how):
    stage = killed.output_dir / "train/kd"
    for checkpoint in list_checkpoints(stage):
        (checkpoint.path / MARKER).write_text(json.dumps(dict(checkpoint.belongs_to)))
        (checkpoint.path / "gradient_watch.json").unlink()
    assert put_damaged_aside(stage) is None
    how(stage / "checkpoint-6" / name)
    run_stages(killed)
    assert (stage / "damaged-checkpoint-6").is_dir()
    assert weights(killed) == weights(trained)


def test_altered_files_that_still_look_like_their_formats_are_told(tmp_path):
    from safetensors.torch import save_file

    weights, state = tmp_path / "model.safetensors", tmp_path / "optimizer.pt"
    torch.save({"step": 1}, state)
    entry = state.read_bytes().index(b"PK\x01\x02") + 8
    damaged = bytearray(state.read_bytes())
    damaged[entry] |= 1  # of the archive's directory: "this file is encrypted"
    state.write_bytes(damaged)
    assert damage(Checkpoint(tmp_path, 2, {})).startswith(f"{state} cannot be read")
    state.unlink()
    save_file({"weight": torch.zeros(2)}, weights)
    assert damage(Checkpoint(tmp_path, 2, {})) is None
    weights.write_bytes(weights.read_bytes().replace(b"data_offsets", b"data_offsetz"))
    assert damage(Checkpoint(tmp_path, 2, {})).startswith(f"{weights} cannot be read")


@pytest.mark.slow
def test_best_checkpoint_that_is_altered_before_it_is_exported_is_named_and_trained_again(recipe_of, monkeypatch):
    trainer = {"learning_rate": 0.02, "optim": "adamw_torch", "max_steps": 12, "lr_scheduler_type": "constant"}
    recipe = recipe_of(
        evaluate={"every_steps": 1, "early_stopping": {"patience": 2}, "keep_best": True},
        trainer={**trainer, "save_steps": 1, "save_total_limit": None, "max_grad_norm_factor": None},
    )
    found = []

    def spoiled(self):
        found.append(self._step_to_keep())
        flip(recipe.output_dir / f"train/kd/checkpoint-{found[0]}" / "model.safetensors")
        return load_best(self)

    load_best = stage_run.DistilTrainer.load_best
    monkeypatch.setattr(stage_run.DistilTrainer, "load_best", spoiled)
    with pytest.raises(
        TrainingError, match=r"model\.safetensors was altered .* the stage's best student, so run the same"
    ):
        run_stages(recipe)
    monkeypatch.setattr(stage_run.DistilTrainer, "load_best", load_best)
    run_stages(recipe)
    assert found[0] > 1, "before the first checkpoint there is none"
    health = json.loads((recipe.output_dir / "train/kd/health.json").read_text())
    assert health["model_is_of_step"] == health["best_step"] == found[0]

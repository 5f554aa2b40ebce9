"""A training that diverges stops with its last good state kept; a disk that cannot hold the result is refused before a
step.
"""

from __future__ import annotations

import json
import math

import pytest

from shared.errors import TrainingError
from student_train.fit import disk_space
from student_train.fit.disk_space import bytes_needed
from student_train.records.checkpoints import list_checkpoints
from student_train.records.metrics_log import read_steps
from student_train.stage.stages import run_stages
from student_train.train.gradient_watch import PATIENCE, PATIENCE_FP16, GradientWatch
from tools.cli import main

HUGE = {
    "optim": "adamw_torch",
    "learning_rate": 100.0,
    "lr_scheduler_type": "constant",
    "max_steps": 8,
    "save_steps": 1,
}


@pytest.mark.slow
def test_exploding_gradients_stop_with_the_newest_state_from_before(recipe_of):
    recipe = recipe_of(trainer=HUGE)
    with pytest.raises(TrainingError) as caught:
        run_stages(recipe)
    directory = recipe.output_dir / "train/kd"
    steps = read_steps(directory / "metrics.jsonl")
    first = steps[0]["grad_norm"]
    assert len(steps) == 1 + PATIENCE
    assert all(step["grad_norm"] > 100 * first for step in steps[1:])
    sentence = str(caught.value)
    assert (
        f"step {len(steps)}: the gradient's norm is {steps[-1]['grad_norm']:.3g}, in the 5th step in a row above 100 "
        "times" in sentence
    )
    assert f"the state after step 1 is kept in {directory / 'checkpoint-1'}" in sentence
    assert "lower trainer.learning_rate" in sentence
    assert [checkpoint.step for checkpoint in list_checkpoints(directory)] == [1], (
        "none is written while the norms are suspicious"
    )
    health = json.loads((directory / "health.json").read_text())
    assert health["stopped"] == sentence
    assert not health["healthy"]
    assert not health["checks"]["not_diverged"]
    run_stages(recipe_of(trainer={**HUGE, "max_grad_norm_factor": None}))
    assert json.loads((directory / "health.json").read_text())["checks"]["not_diverged"], (
        "the check can be switched off"
    )


@pytest.mark.slow
def test_weights_that_are_no_longer_finite_stop_the_stage_and_the_command(recipe_of, tmp_path, capsys):
    from shared.recipe.file import dump_recipe

    trainer = {
        "learning_rate": 10.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 20,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_of(trainer={**trainer, "max_grad_norm_factor": None, "save_steps": 2})))
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert "the gradient's norm is nan, so the training has diverged; the state after step 4 is kept in" in said
    assert "Traceback" not in said


def test_watch_forgives_single_spikes_and_slow_growth_and_counts_overflows_of_a_loss_scale():
    watch = GradientWatch(10.0)
    assert not any(watch.see(1.05**i) for i in range(300)), "the median grows with it"
    watch = GradientWatch(10.0)
    assert not any(watch.see(norm) for norm in ([1.0] * 9 + [1e6]) * 20)
    assert watch.median == 1.0
    assert watch.see(1.0) is None
    told = [watch.see(11.0) for _ in range(PATIENCE)]
    assert told[:-1] == [None] * (PATIENCE - 1)
    assert told[-1] is not None
    assert GradientWatch(None).see(math.inf) == "the gradient's norm is inf"
    scaled = GradientWatch(10.0, scales_loss=True)
    assert [scaled.see(math.inf) is None for _ in range(PATIENCE_FP16)] == [True] * (PATIENCE_FP16 - 1) + [False]


def test_disk_that_is_too_small_is_refused_before_the_first_step(recipe_of, monkeypatch):
    recipe = recipe_of(trainer={"save_total_limit": 2})
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 3 << 20)
    with pytest.raises(
        TrainingError,
        match=r"stage 'kd' needs [4-9]\.\d\d MiB in .* \(2 checkpoints of .* 3\.00 MiB are free; make room, lower",
    ):
        run_stages(recipe)
    assert not (recipe.output_dir / "train/kd/metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "optim"), [("lora", "adamw_torch"), ("none", "sgd")])
def test_bytes_needed_are_those_that_a_run_leaves_on_the_disk(recipe_of, tiny, adapter, optim):
    from student_train.student.student import add_adapter

    recipe = recipe_of(
        student={"adapter": adapter}, trainer={"optim": optim, "max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    )
    run_stages(recipe)
    from transformers import AutoModelForCausalLM

    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny.qwen3), recipe.student.adapter)
    num_checkpoints, checkpoint, final = bytes_needed(model, recipe.stages[0], 4, adapted=adapter != "none")
    assert num_checkpoints == 2, "the one that is kept, and the one being written"
    directory = recipe.output_dir / "train/kd"

    def on_disk(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    slack = 1 << 20
    assert checkpoint - slack < on_disk(directory / "checkpoint-4") <= checkpoint
    assert final - slack < on_disk(directory / "model") + sum(map(on_disk, directory.glob("adapter"))) <= final


def test_resumed_watch_knows_the_norms_of_steps_that_were_not_logged(tmp_path):
    norms = [1.0, 1.2, 0.9, 50.0, 1.1, 60.0, 70.0]
    whole = GradientWatch(10.0)
    for norm in norms:
        whole.see(norm)
    whole.save(tmp_path)
    resumed = GradientWatch(10.0)
    assert resumed.restore(tmp_path)
    assert (resumed.median, resumed.num_suspicious) == (whole.median, 2)
    assert [whole.see(80.0) for _ in range(3)] == [resumed.see(80.0) for _ in range(3)]
    (tmp_path / "other").mkdir()
    assert not GradientWatch(10.0).restore(tmp_path / "other")
    (tmp_path / "gradient_watch.json").write_text('{"norms": 7}')
    with pytest.raises(TrainingError, match=r"remove .* to go on from the checkpoint before it"):
        GradientWatch(10.0).restore(tmp_path)


@pytest.mark.slow
def test_stage_that_logs_seldom_judges_after_a_resume_as_it_would_have(recipe_of):
    """Without the norms of all steps the first ones after a resume would be judged against two norms, or none."""
    recipe = recipe_of(trainer={"max_steps": 6, "save_steps": 3, "logging_steps": 4})
    run_stages(recipe)
    directory = recipe.output_dir / "train/kd"
    checkpoints = list_checkpoints(directory)
    kept = [json.loads((checkpoint.path / "gradient_watch.json").read_text()) for checkpoint in checkpoints]
    assert [len(state["norms"]) for state in kept] == [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    assert kept[1]["norms"][:3] == kept[0]["norms"]

"""A GPU that the driver offers and torch cannot use is named, unless it was said that none is wanted."""

from __future__ import annotations

import pytest
import torch

from shared.errors import EngineError, TrainingError
from shared.models.gpus import unused_gpu


@pytest.fixture
def devices(tmp_path, monkeypatch):
    """A driver with two GPUs, and a torch that sees none."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_machine_without_a_driver_or_with_a_gpu_in_use_is_fine(devices, tmp_path, monkeypatch):
    empty = tmp_path / "dev"
    empty.mkdir()
    (empty / "nvidiactl").touch()
    assert unused_gpu({}, empty) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpu({}, devices) is None


@pytest.mark.parametrize("said", [{}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "GPU-1"}])
@pytest.mark.parametrize("cuda, built", [(None, "a build for CPUs"), ("13.0", "built for CUDA 13.0")])
def test_gpu_that_torch_cannot_use_is_named_with_what_to_do(said, cuda, built, devices, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    problem = unused_gpu(said, devices)
    assert problem.startswith(
        f"this machine has 2 NVIDIA GPU(s) (nvidia0, nvidia1) and torch {torch.__version__}, {built}"
    )
    assert unused_gpu({"CUDA_VISIBLE_DEVICES": ""}, devices) is None  # as the sentence advises
    assert unused_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, devices) is None


def test_teacher_does_not_run_on_the_cpu_instead(monkeypatch, tmp_path):
    from shared.recipe.sections.teacher import TransformersTeacher
    from teacher_cache.engines.transformers import transformers_model

    monkeypatch.setattr(transformers_model, "unused_gpu", lambda: "two GPUs lie idle")
    with pytest.raises(EngineError, match="the teacher would run on the CPU: two GPUs lie idle"):
        transformers_model.CausalModel.load(TransformersTeacher(model="m", engine="transformers"), tmp_path)


@pytest.mark.slow
def test_stage_that_is_to_train_is_refused_and_a_finished_one_is_reused(tmp_path, monkeypatch, capfd):
    from shared.recipe.recipe import Recipe
    from student_train.stage import stage_run
    from student_train.stage.stages import run_stages
    from tests.student_train.tiny_caches import make_cache
    from tests.tiny_models import make_qwen3

    trainer = {"learning_rate": 1e-3, "max_steps": 1, "pack_tokens": 192, "report_to": "none"}
    stage = {"name": "kd", "losses": [{"name": "cross_entropy", "weight": 1.0}], "trainer": trainer}
    model = make_qwen3(tmp_path / "model", seed=1)
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "cache": [str(make_cache(tmp_path / "cache", model))],
            "student": {"model": str(model)},
            "stages": [stage],
        }
    )
    monkeypatch.setattr(stage_run, "unused_gpu", lambda: "two GPUs lie idle")
    with pytest.raises(TrainingError, match="stage 'kd' would train on the CPU: two GPUs lie idle"):
        run_stages(recipe)
    monkeypatch.setattr(stage_run, "unused_gpu", lambda: None)
    run_stages(recipe)
    monkeypatch.setattr(stage_run, "unused_gpu", lambda: "two GPUs lie idle")
    run_stages(recipe)
    assert "finished before" in capfd.readouterr().err

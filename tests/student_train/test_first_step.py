"""A stage is measured against its card before its first step, with measurements put in place of a GPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Stage, Student
from student_train.fit.allocator import expand_segments
from student_train.fit.first_step import DeviceMemory, _device_memory, check_first_step, longest_batch, measured_pass
from student_train.fit.memory import ALONE, FRAGMENTATION, GIB, StepContext, StepMemory, estimate_memory
from student_train.fit.model_shape import ModelShape
from tests.system.program import ROOT

SHAPE = ModelShape(
    num_parameters=600_000_000,
    num_embedding_parameters=155_000_000,
    num_head_parameters=155_000_000,
    num_linear_parameters=440_000_000,
    largest_linear=3_000_000,
    num_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    query_size=2048,
    key_size=1024,
    num_heads=16,
    lora_size=630_784,
    is_tied=True,
)


def stage(checkpointing, **trainer):
    arguments = {"pack_tokens": 8192, "bf16": True, "gradient_checkpointing": checkpointing, **trainer}
    return Stage.model_validate({"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": arguments})


STUDENT = Student.model_validate({"model": "m"})


def test_auto_recomputes_only_where_the_measurement_asks_for_it():
    for kept, expected in ((5 * GIB, False), (30 * GIB, True), (None, True)):
        asked = []

        def measure(recomputes, kept=kept, asked=asked):
            asked.append(recomputes)
            return 4 * GIB if recomputes else kept

        first = check_first_step(stage("auto"), STUDENT, SHAPE, DeviceMemory(24 * GIB, 24 * GIB), measure)
        assert first.gradient_checkpointing is expected
        assert asked == [False, True][: 1 + expected]
        assert first.measured_bytes == (4 * GIB if expected else kept)


def test_bytes_of_a_step_add_the_state_that_comes_after_the_first():
    trainer = stage(False).trainer
    states = 600_000_000 * 8
    assert StepMemory(SHAPE, STUDENT, trainer, ALONE, False).measured_bytes(20 * GIB) == 20 * GIB + states
    accumulated = stage(False, gradient_accumulation_steps=2).trainer
    waiting = accumulated.pack_tokens * 64 * 12  # the targets of the second batch, fetched with the first
    carried = 600_000_000 * 4 + waiting
    assert StepMemory(SHAPE, STUDENT, accumulated, ALONE, False).measured_bytes(20 * GIB) == 20 * GIB + states + carried
    together = StepMemory(SHAPE, STUDENT, trainer, StepContext(2), False).measured_bytes(20 * GIB)
    assert together == 20 * GIB + states + 600_000_000 * 4, "data parallelism holds gradients in buckets, too"
    assert StepMemory(SHAPE, STUDENT, trainer, ALONE, False).measured_bytes(0) == 600_000_000 * 4 * 5, (
        "the update itself"
    )


@pytest.mark.parametrize("checkpointing", [False, True, "auto"])
def test_stage_that_does_not_fit_stops_with_terms_and_a_way_out(checkpointing):
    with pytest.raises(
        TrainingError,
        match=r"stage 'kd' at its longest packs needs \d+\.\d GiB where 20\.0 of the GPU's 24\.0 GiB .*weights",
    ) as caught:
        check_first_step(
            stage(checkpointing), STUDENT, SHAPE, DeviceMemory(20 * GIB, 24 * GIB), lambda recomputes: 30 * GIB
        )
    assert ("gradient_checkpointing: auto" in str(caught.value)) == (checkpointing is False)
    assert "decant plan --card 20GiB" in str(caught.value)


def test_stage_that_runs_out_of_memory_while_measured_stops_with_the_same_sentence():
    with pytest.raises(TrainingError, match=r"needs more than fits where 20\.0 of"):
        check_first_step(stage("auto"), STUDENT, SHAPE, DeviceMemory(20 * GIB, 24 * GIB), lambda recomputes: None)


def test_gaps_of_the_allocator_are_counted_and_what_others_take_is_not_free(monkeypatch):
    measured = estimate_memory(SHAPE, STUDENT, stage(True).trainer).allocated
    tensors = StepMemory(SHAPE, STUDENT, stage(True).trainer, ALONE, True).measured_bytes(measured)
    needed = int(tensors * (1 + FRAGMENTATION))
    first = check_first_step(stage(True), STUDENT, SHAPE, DeviceMemory(needed, 24 * GIB), lambda recomputes: measured)
    assert (first.needed_bytes, first.free_bytes) == (needed, needed)
    assert "that are free of the card's 24.0" in first.text()
    with pytest.raises(TrainingError, match="end what else uses the GPU"):
        check_first_step(stage(True), STUDENT, SHAPE, DeviceMemory(needed - 1, 24 * GIB), lambda recomputes: measured)
    for name, value in (("memory_reserved", 2 * GIB), ("get_per_process_memory_fraction", 1.0)):
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5 * GIB, 24 * GIB))
    assert _device_memory(0) == DeviceMemory(7 * GIB, 24 * GIB), "17 GiB are another's"
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 0.25)
    assert _device_memory(0) == DeviceMemory(6 * GIB, 6 * GIB)


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_set_the_allocator_up(own):
    ours, theirs = {}, {own: "max_split_size_mb:64"}
    expand_segments(ours)
    expand_segments(theirs)
    assert (ours, theirs) == ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, {own: "max_split_size_mb:64"})


def test_training_asks_for_growing_segments_before_torch_is_there(tmp_path):
    program = (
        "import os, sys; from tools.phases import train; import student_train.fit.allocator as a\n"
        "real = a.expand_segments\n"
        "def seen(): real(); print('torch' in sys.modules, os.environ['PYTORCH_ALLOC_CONF']); sys.exit()\n"
        "recipe = type('R', (), {'stages': (), 'stages_between': lambda *names: ()})()\n"
        "a.expand_segments = seen; train(recipe, None, None)"
    )
    kept = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "expandable_segments:True"], done.stderr


def test_longest_batch_is_one_that_training_makes():
    tokens = [5, 9, 9, 1, 8, 8, 9]
    trainer = stage(False, per_device_train_batch_size=2).trainer
    assert list(longest_batch(7, tokens.__getitem__, trainer)) == [4, 5]
    assert list(longest_batch(1, tokens.__getitem__, trainer)) == [0]


def test_measured_pass_leaves_no_gradient_no_value_and_the_random_state(monkeypatch):
    """The CPU stands in for the card; only its counters are replaced."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    calls = []

    def forward(**inputs):
        return SimpleNamespace(loss=torch.nn.Sequential.forward(model, inputs["x"]).sum())

    class Model:
        def __call__(self, **inputs):
            return forward(**inputs)

        zero_grad = staticmethod(model.zero_grad)

    for name, value in (("empty_cache", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 123)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))
    trainer = SimpleNamespace(
        model=Model(),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False)),
        _prepare_inputs=lambda batch: batch,
        forget_measured=lambda: calls.append("forgotten"),
        recompute_activations=lambda base: calls.append("recomputes"),
    )
    before = torch.get_rng_state()
    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2)}
    assert measured_pass(trainer, None, batch, recomputes=True) == 123
    assert calls == ["recomputes", "forgotten"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", _out_of_memory)
    assert measured_pass(trainer, None, batch, recomputes=False) is None


def _out_of_memory(*args):
    raise torch.OutOfMemoryError


@pytest.mark.slow
def test_auto_keeps_activations_on_a_cpu_and_trains(recipe_of):
    from student_train.stage.stages import run_stages

    (model_dir,) = run_stages(recipe_of(trainer={"max_steps": 1, "gradient_checkpointing": "auto"}))
    assert not (model_dir.parent / "memory.json").exists(), "nothing is measured where there is no card"


@pytest.mark.parametrize(
    "student, stage, expected",
    [
        (True, None, True),
        (True, False, False),
        ("auto", False, False),
        (False, True, True),
        (True, "auto", "auto"),
        (False, None, False),
    ],
)
def test_stage_that_says_whether_it_recomputes_is_not_overruled_by_the_student(student, stage, expected):
    from shared.recipe.recipe import StageTrainer, Student
    from shared.recipe.sections.training import recomputation

    settings = {} if stage is None else {"gradient_checkpointing": stage}
    found = recomputation(Student(model="m", gradient_checkpointing=student), StageTrainer(**settings))
    assert found == expected


def test_stage_overrules_the_student_when_it_trains_and_keeps_its_identity(recipe_of):
    from student_train.stage.stage_identity import stage_identity
    from student_train.stage.stage_run import arguments_of
    from student_train.stage.stage_work import resolve_stage

    found, identities = [], []
    for said in ({}, {"gradient_checkpointing": False}, {"gradient_checkpointing": True}):
        recipe = recipe_of(student={"gradient_checkpointing": True}, trainer=said)
        work = resolve_stage(recipe, recipe.stages[0])
        found.append(arguments_of(work).gradient_checkpointing)
        identities.append([stage_identity(work), stage_identity(work, only_moved=True)])
    assert found == [True, False, True]
    assert identities[0] == identities[1] != identities[2]
    whole, moved = identities[0]
    assert whole["stage"]["trainer"]["gradient_checkpointing"] is False  # as every earlier version wrote it
    assert "gradient_checkpointing" not in moved["stage"].get("trainer", {})

"""Updates of bfloat16 weights: how many are lost to nearest rounding, and none by chance; against float64."""

from __future__ import annotations

import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Stage, StageTrainer, Student
from student_train.fit.precision import precision_notes, share_moved
from student_train.stage.stages import run_stages
from student_train.train.stochastic_rounding import StochasticRounding, round_stochastically

LOSSES = [{"name": "forward_kl"}]


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_share_of_weights_that_a_full_step_moves_is_the_one_that_rounding_shows(rate, dtype):
    weights = (torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, dtype))
    moved = (weights.double() - rate).to(weights.dtype) != weights
    assert share_moved(rate, dtype) == pytest.approx(float(moved.double().mean()), abs=0.015)


def test_rounding_by_chance_gives_a_neighbour_and_keeps_the_mean():
    values = torch.tensor([1 + 2**-9, -3.3, 0.0123, 1e-20, 1.0, 0.0, torch.inf, -torch.inf, torch.nan])
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([round_stochastically(values.clone(), generator) for _ in range(20_000)])[:, :6].double()
    exact = values[:6].double()
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-300))) - 7)
    assert bool(((drawn - exact).abs() < step).all())
    share = (exact / step).abs() % 1
    tolerance = 4.5 * step * (share * (1 - share) / 20_000).sqrt() + 1e-300
    assert bool(((drawn.mean(0) - exact).abs() <= tolerance).all())
    special = round_stochastically(values.clone(), generator)[6:]
    assert special[:2].tolist() == [torch.inf, -torch.inf]
    assert bool(special[2].isnan())


def _displacement(rounding: str, steps: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far bfloat16 weights moved, and how far float64 ones do under the same gradients."""
    generator = torch.Generator().manual_seed(2)
    start = (torch.randn(20_000, generator=generator) * 0.02).bfloat16()
    weight, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([weight], lr=rate)
    if rounding == "stochastic":
        made = iter(range(steps))
        optimizer = StochasticRounding(optimizer, 7, lambda: next(made))
    reference = torch.optim.AdamW([exact], lr=rate)
    for _ in range(steps):
        weight.grad = (torch.randn(len(start), generator=generator) + 2).bfloat16()
        exact.grad = weight.grad.double()
        optimizer.step()
        reference.step()
    return weight.double().detach() - start.double(), exact.detach() - start.double()


def test_updates_are_lost_to_nearest_rounding_and_kept_by_chance():
    moved, exact = _displacement("stochastic", 100, 1e-5)
    assert float(moved.mean() / exact.mean()) == pytest.approx(1, abs=0.02)
    lost, exact = _displacement("nearest", 100, 1e-5)
    assert float(lost.mean() / exact.mean()) < 0.5
    assert float((lost == 0).double().mean()) > 0.6


def test_weights_in_float32_beside_narrow_ones_are_updated_as_ever():
    wide, narrow = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    alone = torch.nn.Parameter(torch.ones(8))
    place = narrow.data_ptr()
    optimizer = StochasticRounding(torch.optim.AdamW([wide, narrow], lr=1e-3), 0, lambda: 0)
    reference = torch.optim.AdamW([alone], lr=1e-3)
    for weight in (wide, narrow, alone):
        weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    reference.step()
    assert torch.equal(wide, alone)
    assert (narrow.data_ptr(), narrow.dtype) == (place, torch.bfloat16), "ties and buckets hold on to the storage"
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.float32


def _rounded(seed: int, step: int) -> torch.Tensor:
    """Return 4,096 weights of 1 after a step of a third of their last bit."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 2**-8 / 3)
    StochasticRounding(torch.optim.SGD([weight], lr=1.0), seed, lambda: step).step()
    return weight.detach() != 1


def test_chance_depends_on_seed_and_step():
    assert torch.equal(_rounded(3, 5), _rounded(3, 5))
    for seed, step in ((3, 6), (4, 5), (2**31, 5), (5, 3)):
        equal = (_rounded(3, 5) == _rounded(seed, step)).double().mean()
        assert float(equal) == pytest.approx(5 / 9, abs=0.05), "as much as two throws of one chance in three agree"


NARROW = {"dtype": "bfloat16"}


@pytest.mark.slow
def test_killed_run_that_rounds_by_chance_ends_with_the_weights_of_one_that_was_not(recipe_of, run_apart):
    settings = {"rounding": "stochastic", "learning_rate": 1e-4, "save_steps": 2, "max_steps": 4}
    whole = recipe_of(student=NARROW, trainer=settings)
    (model,) = run_stages(whole)
    weights, log = (model / "model.safetensors").read_bytes(), (model.parent / "metrics.jsonl").read_bytes()
    model.parent.rename(model.parent.with_name("whole"))
    assert run_apart(whole, "train_step.after_write@3") != 0
    (again,) = run_stages(whole)
    assert (again / "model.safetensors").read_bytes() == weights
    assert (again.parent / "metrics.jsonl").read_bytes() == log
    narrow = recipe_of(student=NARROW, trainer={**settings, "rounding": "nearest"}, name="nearest")
    (other,) = run_stages(narrow)
    assert (other / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    "student, trainer, said",
    [
        ({}, {"learning_rate": 1e-5}, []),
        (NARROW, {"learning_rate": 1e-4}, []),
        (NARROW, {"learning_rate": 2e-5}, ["moves 30%"]),
        (NARROW, {"learning_rate": 2e-5, "rounding": "stochastic"}, []),
        ({**NARROW, "adapter": "lora"}, {"learning_rate": 2e-5}, []),
        ({"dtype": "float16"}, {"learning_rate": 1e-6, "adam_epsilon": 1e-5}, ["moves 15%"]),
    ],
)
def test_stage_that_rounds_its_updates_away_is_told_the_share_and_two_ways_out(student, trainer, said):
    stage = Stage.model_validate({"name": "kd", "losses": LOSSES, "trainer": trainer})
    notes = precision_notes(stage, Student.model_validate({"model": "m", **student}), on_gpu=False)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    "trainer, way_out",
    [
        ({}, "adam_epsilon: 1e-05"),
        ({"optim": "adamw_torch_fused", "adam_epsilon": 1e-7}, "adam_epsilon: 1e-05"),
        ({"optim": "rmsprop"}, "NaN or large; set student.dtype: float32"),
        ({"optim": "adafactor"}, None),
        ({"optim": "sgd"}, None),
    ],
)
def test_float16_weights_are_told_when_they_are_divided_by_nothing_and_the_way_out_works(recipe_of, trainer, way_out):
    """As a step does it: the weights of one are NaN or far away, those of the other are not."""
    settings, narrow = {"learning_rate": 1e-4, "max_steps": 4, **trainer}, {"dtype": "float16"}
    recipe = recipe_of(student=narrow, trainer=settings)
    notes = precision_notes(recipe.stages[0], recipe.student, on_gpu=False)
    assert [way_out in note for note in notes] == [True] * (way_out is not None)
    if way_out is None or "adam" in way_out:
        kept = settings | ({"adam_epsilon": 1e-5} if way_out else {})
        run_stages(recipe_of(student=narrow, trainer=kept, name="kept"))
    if way_out is not None and settings.get("optim") != "adamw_torch_fused":
        with pytest.raises(TrainingError, match="the loss is nan"):
            run_stages(recipe)


@pytest.mark.parametrize("trainer, told", [({}, True), ({"bf16": True}, False), ({"tf32": True}, False)])
def test_plain_float32_is_said_where_there_is_a_gpu_alone(trainer, told):
    stage = Stage(name="kd", losses=LOSSES, trainer=StageTrainer.model_validate(trainer))
    student = Student(model="m")
    assert [("plain float32" in note) for note in precision_notes(stage, student, on_gpu=True)] == [True] * told
    assert precision_notes(stage, student, on_gpu=False) == []


@pytest.mark.slow
def test_train_says_what_plan_says(recipe_of, capsys):
    from tools.plan.planner import plan, plan_text

    recipe = recipe_of(student=NARROW, trainer={"learning_rate": 2e-5, "max_steps": 1})
    said = "train kd: weights are kept in bfloat16 and a full step at learning rate 2e-05 moves 30% of them"
    assert said in plan_text(plan(recipe))
    run_stages(recipe)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "student, trainer, said",
    [
        ({}, {}, "here none is trained"),
        ({**NARROW, "adapter": "lora"}, {}, "here none is trained"),
        (NARROW, {"optim": "adafactor"}, "adafactor cannot step weight by weight; choose one of adamw_torch"),
        (NARROW, {"optim": "paged_adamw_8bit"}, "cannot step weight by weight"),
        (NARROW, {"fsdp": "full_shard"}, "does not work on shards"),
    ],
)
def test_rounding_that_would_do_nothing_or_wrong_is_refused(recipe_of, student, trainer, said):
    with pytest.raises(ValueError, match=said):
        recipe_of(student=student, trainer={"rounding": "stochastic", **trainer})

"""Optimizers that train other weights than those that count: a schedule-free one, written out here, in float64."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from student_train.stage.stages import run_stages
from student_train.train.averaged_weights import averaged, settle

BETA = 0.5
EVALUATED = {"every_steps": 2, "keep_best": False}


class ScheduleFree(torch.optim.Optimizer):
    """Gradients at y = (1 - BETA) z + BETA x, where x is the mean of the z so far; the interface of `schedulefree`."""

    def __init__(self, weights, lr=0.05):
        super().__init__(weights, {"lr": lr, "train_mode": False, "k": 0})

    def _switch(self, weight_of_z, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for weight in group["params"]:
                    if "z" in self.state[weight]:
                        weight.data.lerp_(self.state[weight]["z"], weight_of_z)
                group["train_mode"] = mode

    def eval(self):
        self._switch(1 - 1 / BETA, False)

    def train(self):
        self._switch(1 - BETA, True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            share = 1 / group["k"]
            for weight in group["params"]:
                state = self.state[weight]
                z = state.setdefault("z", weight.detach().clone())
                mean = (weight - (1 - BETA) * z) / BETA
                z.sub_(group["lr"] * weight.grad)
                weight.copy_((1 - BETA) * z + BETA * ((1 - share) * mean + share * z))


@pytest.fixture
def schedule_free(monkeypatch):
    def create(self, model=None):
        self.optimizer = ScheduleFree([one for one in self.model.parameters() if one.requires_grad])
        return self.optimizer

    monkeypatch.setattr(transformers.Trainer, "create_optimizer", create)


def settings(**more):
    constant = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 0.05}
    return {**constant, "max_steps": 6, "save_steps": 6, **more}


def test_average_is_what_leaves_and_what_a_checkpoint_holds(recipe_of, schedule_free, monkeypatch):
    """The point between, at which the last gradient would have been taken, left instead."""
    seen = []
    stock = ScheduleFree.step
    monkeypatch.setattr(
        ScheduleFree,
        "step",
        lambda self, closure=None: (stock(self), seen.append([s["z"].double().clone() for s in self.state.values()])),
    )
    (model,) = run_stages(recipe_of(trainer=settings()))
    mean = [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)]
    last, trained = seen[-1], load_file(model / "model.safetensors")
    kept = load_file(model.parent / "checkpoint-6/model.safetensors")
    names = [name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(model).named_parameters()]
    for name, expected, z in zip(names, mean, last, strict=True):
        assert torch.equal(trained[name], kept[name])
        assert torch.allclose(trained[name].double(), expected, atol=1e-6), name
        between = (1 - BETA) * z + BETA * expected
        assert torch.allclose(expected, between, atol=1e-6) or not torch.allclose(trained[name].double(), between)


def test_evaluations_leave_no_trace_and_measure_what_leaves(recipe_of, schedule_free, monkeypatch):
    (plain,) = run_stages(recipe_of(trainer=settings(), name="plain"))
    (model,) = run_stages(recipe_of(trainer=settings(), evaluate=EVALUATED))
    assert (model / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert (model.parent / "metrics.jsonl").read_bytes() == (plain.parent / "metrics.jsonl").read_bytes()
    last = json.loads((model.parent / "evaluations.jsonl").read_text().splitlines()[-1])
    monkeypatch.undo()
    again = {"max_steps": 1, "learning_rate": 1e-30, "optim": "sgd"}
    (after,) = run_stages(recipe_of(trainer=again, evaluate=EVALUATED, name="after", init_from=str(model)))
    first = json.loads((after.parent / "evaluations.jsonl").read_text().splitlines()[0])
    assert first["kl_nats"] == last["kl_nats"]


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(recipe_of, schedule_free, monkeypatch):
    (whole,) = run_stages(recipe_of(trainer=settings(save_steps=2), name="whole"))
    stock, made = ScheduleFree.step, []

    def stops(self, closure=None):
        made.append(stock(self))
        if len(made) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScheduleFree, "step", stops)
    recipe = recipe_of(trainer=settings(save_steps=2))
    with pytest.raises(KeyboardInterrupt):
        run_stages(recipe)
    monkeypatch.setattr(ScheduleFree, "step", stock)
    (model,) = run_stages(recipe)
    assert (model / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_weights_come_back_bit_by_bit_and_other_optimizers_are_left_alone():
    weight = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    optimizer = ScheduleFree([weight])
    optimizer.train()
    for _ in range(3):
        weight.grad = weight.detach().cos()
        optimizer.step()
    before = weight.detach().clone()
    with averaged(optimizer):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    assert optimizer.param_groups[0]["train_mode"]
    settle(optimizer)
    with averaged(optimizer):
        pass
    assert not optimizer.param_groups[0]["train_mode"], "its average stays where it is"
    plain = torch.optim.SGD([weight], lr=0.1)
    settle(plain)
    with averaged(plain):
        pass

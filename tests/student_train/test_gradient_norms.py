"""Gradient norms of all of a stage's losses at the states that they share, against autograd over rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Stage, Student
from student_train.layers.layer_losses import check_layer_losses
from student_train.layers.projections import MODULE
from student_train.losses import LossTerm
from student_train.student.forward_patch import GRADIENT_SQUARE
from tests.student_train.test_layer_losses import LOSSES, Run, dense_values
from tests.student_train.test_layer_losses import tiny as tiny  # the fixture

ROWS = [0, 3, 5]
ON_FINAL = [{"name": "hidden", "layer_map": {"final": "final"}}, LOSSES[2]]
BELOW_LAYER_1 = [LOSSES[0], {"name": "attention", "layer_map": {1: 1, 2: 3}}, LOSSES[2]]


def with_cross_entropy(tiny, losses, **settings) -> Run:
    run = Run(tiny, losses=losses, **settings)
    run.objective.terms = [LossTerm("cross_entropy", 0.3), *run.objective.terms]
    return run


def measured(run: Run, batches: list[dict]) -> tuple[dict, dict, dict]:
    """Norms by loss, other values and gradients of a step that measures."""
    run.objective.measures_gradients = True
    _, values, gradients = run.gradients(batches)
    run.objective.measures_gradients = False
    squares = {name: values.pop(name) for name in list(values) if name.startswith(GRADIENT_SQUARE)}
    return {name.removeprefix(GRADIENT_SQUARE): square**0.5 for name, square in squares.items()}, values, gradients


def labels_loss(run: Run, final: list[torch.Tensor], rows: list[int]) -> torch.Tensor:
    """Cross-entropy per position of `rows`, from the state [L, H] of each after the last norm."""
    total, count = 0.0, 0
    for states, index in zip(final, rows, strict=True):
        at = run.caches[index].predictor_index().astype(np.int64)
        labels = torch.from_numpy(run.caches[index].token_ids.astype(np.int64)[at + 1])
        total = total + torch.nn.functional.cross_entropy(run.base.lm_head(states[at]), labels, reduction="sum")
        count += len(at)
    return total / count


@pytest.mark.parametrize(
    ("losses", "shared_layer"),
    [
        pytest.param(LOSSES, 1, id="attention-2"),
        pytest.param([LOSSES[0], LOSSES[2]], 2, id="hidden-2"),
        (BELOW_LAYER_1, 0),
    ],
)
def test_norms_below_the_lowest_layer_that_is_read_are_those_of_rows_alone(tiny, losses, shared_layer) -> None:
    run = with_cross_entropy(tiny, losses)
    found, _, _ = measured(run, [run.batch(ROWS)])
    body = run.base.model
    leaves, final = [], []

    def cut(module, inputs, output):
        leaves.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
        return leaves[-1]

    shared = body.embed_tokens if shared_layer == 0 else body.layers[shared_layer - 1]
    handles = [shared.register_forward_hook(cut), body.norm.register_forward_hook(lambda m, i, o: final.append(o[0]))]
    dense = dense_values(run, ROWS, (1, 3) if shared_layer == 0 else (2, 3))
    for handle in handles:
        handle.remove()
    dense["cross_entropy"] = labels_loss(run, final, ROWS)
    assert set(found) == {"cross_entropy", *(loss["name"] for loss in losses)}
    for name, norm in found.items():
        gradients = torch.autograd.grad(dense[name], leaves, retain_graph=True)
        expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        assert norm == pytest.approx(expected, rel=2e-3), name
        assert norm > 0


def test_norms_are_taken_at_the_last_hidden_states_where_all_losses_read_them(tiny) -> None:
    run = with_cross_entropy(tiny, ON_FINAL)
    found, _, _ = measured(run, [run.batch(ROWS)])
    final = []
    with torch.no_grad():
        for index in ROWS:
            ids = torch.from_numpy(run.caches[index].token_ids.astype(np.int64))[None]
            final.append(run.base.model(input_ids=ids, use_cache=False).last_hidden_state[0])
    leaves = [states.requires_grad_() for states in final]
    hidden, count = 0.0, 0
    for states, index in zip(leaves, ROWS, strict=True):
        at = run.caches[index].predictor_index().astype(np.int64)
        teacher = torch.from_numpy(run.caches[index].hidden.states.dense())[2]
        teacher = teacher / teacher.square().mean(-1, keepdim=True).sqrt()
        hidden = (
            hidden
            + (getattr(run.base, MODULE)["teacher_final_student_final"](states[at]) - teacher).square().mean(-1).sum()
        )
        count += len(at)
    dense = {"hidden": hidden / count, "cross_entropy": labels_loss(run, leaves, ROWS)}
    for name, value in dense.items():
        gradients = torch.autograd.grad(value, leaves)
        expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        assert found[name] == pytest.approx(expected, rel=1e-4), name
    alone, _, _ = measured(run, [run.batch([2])])
    assert alone["contrastive"] == 0
    assert alone["hidden"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("losses", [LOSSES, BELOW_LAYER_1], ids=["layer-1", "embeddings"])
def test_adapters_recomputation_and_accumulation_measure_the_same_and_measuring_changes_no_step(tiny, losses) -> None:
    plain = with_cross_entropy(tiny, losses)
    expected, _, _ = measured(plain, [plain.batch(ROWS)])
    for adapter in ("none", "lora"):
        for checkpointing in (False, True):
            run = with_cross_entropy(tiny, losses, adapter=adapter, checkpointing=checkpointing)
            norms, values, gradients = measured(run, [run.batch(ROWS)])
            assert norms == pytest.approx(expected, rel=1e-5), (adapter, checkpointing)
            _, same_values, same_gradients = run.gradients([run.batch(ROWS)])
            assert values == same_values
            assert gradients.keys() == same_gradients.keys()
            assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())
    split, _, _ = measured(plain, [plain.batch(ROWS[:1]), plain.batch(ROWS[1:])])
    for name in ("hidden", "attention", "cross_entropy"):  # contrastive sees other rows there
        assert split[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "student", "said"),
    [
        ({"fp16": True}, {}, "set trainer.bf16 instead"),
        ({}, {"liger": True}, "leave liger out, or set balance to uncertainty"),
    ],
)
def test_settings_under_which_gradients_cannot_be_measured_are_refused(trainer, student, said) -> None:
    def check(losses, balance):
        stage = Stage.model_validate({"name": "kd", "losses": losses, "balance": balance, "trainer": trainer})
        check_layer_losses(stage, Student.model_validate({"model": "student", **student}))

    with pytest.raises(TrainingError, match=said):
        check(LOSSES, "grad_norm")
    check(LOSSES, "uncertainty")
    check([{"name": "forward_kl"}, LOSSES[2]], "grad_norm")

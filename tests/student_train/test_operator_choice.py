"""Which kernels the loss uses: asked for, refused, or measured."""

from __future__ import annotations

import pytest

from shared.errors import TrainingError
from student_train.operator import operator_choice
from student_train.operator.operator_choice import faster_operator


def test_operator_that_cannot_run_here_is_refused_and_auto_takes_what_can(monkeypatch):
    assert operator_choice.operator_for("torch", "cpu") == operator_choice.operator_for("auto", "cpu") == "torch"
    with pytest.raises(
        TrainingError, match=r"trainer\.operator is triton, which needs an NVIDIA GPU; .*set it to auto"
    ):
        operator_choice.operator_for("triton", "cpu")
    monkeypatch.setattr(operator_choice, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"needs the package triton"):
        operator_choice.operator_for("triton", "cuda")
    assert operator_choice.operator_for("auto", "cuda") == "torch"
    monkeypatch.setattr(operator_choice, "find_spec", lambda name: name)
    assert operator_choice.operator_for("auto", "cuda") == "auto"


@pytest.mark.parametrize(("torch_seconds", "triton_seconds"), [(3.0, 2.0), (2.0, 3.0)])
def test_auto_keeps_the_faster_one(torch_seconds, triton_seconds):
    clock = {"torch": torch_seconds, "triton": triton_seconds}
    assert faster_operator(lambda operator: clock[operator], lambda call: call()) == min(clock, key=clock.get)


def test_auto_falls_back_aloud_where_triton_cannot_compile(capsys):
    def loss(operator):
        if operator == "triton":
            raise RuntimeError("no C compiler")
        return 1.0

    assert faster_operator(loss, lambda call: call()) == "torch"
    assert "no C compiler" in capsys.readouterr().err


@pytest.mark.slow
def test_recipe_setting_reaches_the_loss(recipe_of, monkeypatch):
    from student_train.stage.stages import run_stages
    from student_train.student import forward_patch

    seen = []
    original = forward_patch.fused_sparse_loss

    def spy(*args, **settings):
        seen.append((settings["operator"], settings["chunk_bytes"]))
        return original(*args, **settings)

    monkeypatch.setattr(forward_patch, "fused_sparse_loss", spy)
    run_stages(recipe_of(trainer={"max_steps": 1, "operator_chunk_mib": 3}))
    assert seen == [("torch", 3 << 20)]
    with pytest.raises(TrainingError, match=r"trainer\.operator is triton"):
        run_stages(recipe_of(trainer={"max_steps": 1, "operator": "triton"}, name="other"))

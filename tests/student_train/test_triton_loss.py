"""The loss by tiles of the vocabulary equals dense float64 autograd and the loss by chunks; Triton runs in its
interpreter here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from tests.student_train.dense_loss import dense_loss, make_case, relative_error


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed")
    import student_train.operator.tiled_loss as tiled_loss

    monkeypatch.setattr(tiled_loss, "MIN_TILE", 16)  # two tiles of the tiny vocabulary


def run(case, terms, operator, *, dtype=torch.float64, **settings):
    hidden, weight = case.hidden.to(dtype).requires_grad_(), case.weight.to(dtype).requires_grad_()
    settings = {"chunk_bytes": 1, **settings}
    fused = fused_sparse_loss(hidden, weight, case.labels, case.targets, terms, 9, operator=operator, **settings)
    return [fused.loss, *fused.values.values()], torch.autograd.grad(fused.loss, [hidden, weight])


TERMS = {
    "kd and ce": [LossTerm("forward_kl", 0.9), LossTerm("cross_entropy", 0.1)],
    "ce": [LossTerm("cross_entropy")],
    "hot": [LossTerm("reverse_kl", 1.0, 2.0)],
    "many": [
        LossTerm("forward_kl", 0.5),
        LossTerm("forward_kl", 0.25, 2.0),
        LossTerm("reverse_kl", 0.125),
        LossTerm("jsd", 0.5, 2.0),
        LossTerm("cross_entropy", 0.3),
    ],
}


@pytest.mark.parametrize("shape", ["fixed", "ragged", "whole", "hybrid"])
@pytest.mark.parametrize("name", TERMS)
def test_tiles_give_the_value_and_gradients_of_dense_autograd(name, shape):
    case = make_case(shape, vocab=37 if shape != "whole" else 23)
    values, gradients = run(case, TERMS[name], "triton")
    inputs = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    expected = dense_loss(case, inputs[0] @ inputs[1].t(), TERMS[name], 9)
    assert relative_error(values[0].detach(), expected.detach()) < 1e-6
    for found, wanted in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(found, wanted) < 1e-6
    by_chunks, _ = run(case, TERMS[name], "torch")
    torch.testing.assert_close(values, by_chunks, rtol=1e-6, atol=1e-9)


def test_bias_scale_softcap_padded_head_and_frozen_weight_are_as_by_chunks():
    case = make_case("ragged", vocab=37)
    padded = torch.cat([case.weight, torch.ones(5, case.weight.shape[1], dtype=torch.float64)])
    results = []
    for operator in ("torch", "triton"):
        inputs = [
            tensor.clone().requires_grad_()
            for tensor in (case.hidden, padded, torch.linspace(-1, 1, 42, dtype=torch.float64))
        ]
        settings = {"logit_scale": 0.5, "softcap": 2.0, "vocab_size": 37, "operator": operator, "chunk_bytes": 1}
        fused = fused_sparse_loss(
            *inputs[:2], case.labels, case.targets, TERMS["many"], 9, head_bias=inputs[2], **settings
        )
        frozen = fused_sparse_loss(inputs[0], padded, case.labels, case.targets, TERMS["many"], 9, **settings)
        results.append([*torch.autograd.grad(fused.loss, inputs), *torch.autograd.grad(frozen.loss, inputs[:1])])
    for by_chunks, by_tiles in zip(*results, strict=True):
        assert relative_error(by_tiles, by_chunks) < 1e-6


def test_float32_tail_of_1e_8_keeps_its_gradient():
    """The rest comes from its own log-sum-exp, not from 1 - members."""
    teacher = torch.zeros(9, 37, dtype=torch.float64)
    teacher[:, :4] = 8.0 + torch.arange(4)
    case = make_case("fixed", vocab=37, teacher=teacher)
    case.hidden[:, 0] = 1.0
    case.weight[:, 0] = 0.0
    case.weight[:4, 0] = 20.0
    tails = (case.hidden @ case.weight.t()).softmax(1)[:, 4:].sum(1)
    assert tails.min() < 2e-8
    exact, wanted = run(case, TERMS["kd and ce"], "torch")
    values, gradients = run(case, TERMS["kd and ce"], "triton", dtype=torch.float32)
    assert relative_error(values[0].detach().double(), exact[0].detach()) < 1e-5
    for found, expected in zip(gradients, wanted, strict=True):
        assert relative_error(found.double(), expected) < 1e-4


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from student_train.operator import triton_kernels as kernels
number, pointer, target = "fp32", "*fp32", GPUTarget("cuda", 89, 32)
def binary(kernel, types, **constants):
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    return len(triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target).asm["cubin"])
sizes = dict.fromkeys(["stride", "width"], "i32")
first = {"tile": pointer, **sizes, "temperature": number, "row_max": pointer, "row_sum": pointer}
print(binary(kernels._online_logsumexp, first, BLOCK=2048))
second = {"tile": pointer, "stride": "i32", "out": pointer, "out_stride": "i32", "width": "i32", "temperature": number}
second |= {"log_rest": pointer, "coefficient": pointer}
for add in (False, True):
    print(binary(kernels._rest_gradient, second, ADD=add, BLOCK=2048))
"""


@pytest.mark.slow
def test_kernels_compile_for_an_ada_card_without_one(tmp_path):
    """What the interpreter lets pass may still be refused by the compiler, which needs no card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert all(int(size) > 1000 for size in child.stdout.split())

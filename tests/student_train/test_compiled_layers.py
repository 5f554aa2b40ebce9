"""Compiled students: packs of every length share their graphs, and steps are those of plain ones."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from shared.errors import TrainingError
from student_train.stage.stages import run_stages
from student_train.student.decoder_layers import compile_layers
from student_train.student.row_attention import NAME, switch_attention
from student_train.student.student_head import body_of, run_body


def _packs(vocab: int, count: int):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        lengths = torch.randint(2, 40, (1 + i % 6,), generator=generator).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        yield torch.randint(vocab, positions.shape, generator=generator), positions


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_packs_of_other_lengths_and_rows_compile_nothing_again(tiny, recomputes):
    from torch._dynamo.testing import CompileCounter
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    models = [AutoModelForCausalLM.from_pretrained(tiny.qwen3).train() for _ in range(2)]
    counter, graphs = CompileCounter(), []
    for model in models:
        switch_attention(model, NAME)
    if recomputes:
        models[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compile_layers(models[0], backend=counter)
    for ids, positions in _packs(models[0].config.vocab_size, 14):
        found, expected = (run_body(body_of(model), ids, positions) for model in models)
        for states in (found, expected):
            states.square().mean().backward()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[-1] <= 4
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_model_that_does_not_name_its_layers_is_not_compiled(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.llama)
    model._no_split_modules = None
    with pytest.raises(TrainingError, match=r"does not name its decoder layers, which trainer\.torch_compile needs"):
        compile_layers(model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_stage_logs_the_losses_of_a_plain_one(recipe_of):
    losses = []
    for compiled in (False, True):
        recipe = recipe_of(trainer={"torch_compile": compiled, "max_steps": 3}, name=f"kd-{compiled}".lower())
        (model,) = run_stages(recipe)
        lines = (model.parent / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

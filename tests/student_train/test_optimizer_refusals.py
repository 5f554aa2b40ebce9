"""Optimizers that cannot run here, or cannot train what they are given, are refused before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from shared.errors import TrainingError
from shared.recipe.recipe import StageTrainer
from student_train.train.training_problems import check_dense_gradients, check_optimizer


class _OfAGpu(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


def test_optimizer_whose_kernels_need_a_gpu_is_refused_in_a_sentence(monkeypatch):
    """It was told as a bug of Decant, after the student was loaded."""
    made = staticmethod(lambda args, model=None: (_OfAGpu, {"lr": 0.1}))
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", made)
    here = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"trainer\.optim stable_adamw cannot be used: 0 active drivers"):
        check_optimizer(StageTrainer(optim="stable_adamw"), here)
    check_optimizer(StageTrainer(optim="sgd"), here)


def test_eight_bits_for_rare_tokens_are_refused_where_embeddings_are_trained():
    """torchao's AdamW in 8 bits made weights of 1,800 of rows that are seen now and then, where AdamW's are 0.2."""
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    narrow = StageTrainer(optim="adamw_torch_8bit")
    with pytest.raises(TrainingError, match=r"adamw_torch_8bit, which keeps .* use adamw_8bit"):
        check_dense_gradients(narrow, model)
    for optim in ("adamw_8bit", "adamw_torch", "adamw_torch_4bit"):
        check_dense_gradients(StageTrainer(optim=optim), model)
    model[0].requires_grad_(False)
    check_dense_gradients(narrow, model)

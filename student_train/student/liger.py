"""liger-kernel's norms, MLP and rotary embeddings in a student, and in it alone.

Its losses stay off: the loss reads the head itself (fused_loss.py). liger-kernel replaces layers of the instance, and
functions and classes of the model's module in transformers; those of the module are put back when the training is over,
so that a later stage without it does without it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shared.errors import TrainingError

PARTS = {"rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True}
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_liger(*, wanted: bool) -> None:
    """Refuse liger-kernel where it cannot run.

    Raises:
        TrainingError: the package or an NVIDIA GPU is missing.
    """
    if not wanted:
        return
    missing = [] if importlib.util.find_spec("liger_kernel") else ["the package liger-kernel (decant-kd[gpu])"]
    missing += [] if torch.cuda.is_available() else ["an NVIDIA GPU"]
    if missing:
        raise TrainingError(
            f"student.liger is on, which needs {' and '.join(missing)}; add what is missing, or leave it out"
        )


@contextmanager
def liger_layers(model: Any, *, wanted: bool) -> Iterator[None]:
    """Give a model liger-kernel's layers while it trains, where that is wanted.

    Raises:
        TrainingError: liger-kernel knows no layers of this model.
    """
    if not wanted:
        yield
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise TrainingError(
            f"student.liger is on, but liger-kernel knows no layers of a model of type {kind}; leave it out"
        )
    module = sys.modules[type(model).__module__]
    before, forward = dict(vars(module)), type(model).forward
    try:
        _apply_liger_kernel_to_instance(model, **PARTS, **LOSSES)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
        type(model).forward = forward

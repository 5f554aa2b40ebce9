"""Learned projections from the student's width to the stored one: trained with the stage, saved in its checkpoints,
never exported.

They are a module of the student while it trains, so that the optimizer, clipping, data parallelism and mixed precision
treat them as any weight; they are float32 whatever the student is. Saved weights of the student leave them out: a
checkpoint has them in a file of their own.
Cost: H x D weights each.

Shape letters: H student width, D stored width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import TrainingError, reason_of

MODULE = "decant_projections"
FILE = "projections.safetensors"


def add_projections(base: Any, names: Sequence[str], width: int, *, seed: int) -> None:
    """Give the student projections [H, D] by name, drawn from `seed` alone; none where there are no names."""
    if not names:
        return
    student_width = base.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    modules = nn.ModuleDict()
    device = base.get_input_embeddings().weight.device
    for name in names:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # the layer's own first weights are not used
            linear = nn.Linear(student_width, width, bias=False, dtype=torch.float32)
            linear.weight.copy_(torch.randn(width, student_width, generator=generator) / student_width**0.5)
        modules[name] = linear.to(device)
    base.add_module(MODULE, modules)


def projected(base: Any, name: str, states: Tensor) -> Tensor:
    """Return [..., D] float32 projections of [..., H] states."""
    with torch.autocast(states.device.type, enabled=False):
        result: Tensor = getattr(base, MODULE)[name](states.float())
    return result


def remove_projections(base: Any) -> None:
    """Take the projections off the student, so that nothing of them is exported."""
    base._modules.pop(MODULE, None)


def without_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by name without the projections'."""
    return {name: weight for name, weight in weights.items() if f"{MODULE}." not in name}


def has_projections(base: Any) -> bool:
    """Tell whether the student has projections."""
    return MODULE in base._modules


def save_projections(base: Any, directory: Path) -> None:
    """Write the projections into a checkpoint's directory; nothing where there are none."""
    from safetensors.torch import save_file

    if has_projections(base):
        weights = {
            name: weight.detach().cpu().contiguous() for name, weight in getattr(base, MODULE).state_dict().items()
        }
        save_file(weights, directory / FILE)


def load_projections(base: Any, directory: Path) -> None:
    """Read the projections of a checkpoint back; nothing where the student has none.

    Raises:
        TrainingError: the checkpoint has other projections.
    """
    from safetensors.torch import load_file

    if not has_projections(base):
        return
    path = directory / FILE
    if not path.is_file():
        raise TrainingError(
            f"{directory} has no {FILE}, so it cannot be continued with its losses; remove the stage's directory"
        )
    try:
        getattr(base, MODULE).load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = reason_of(error, 200)
        raise TrainingError(
            f"{path} holds other projections than the stage trains ({reason}); remove the stage's directory"
        ) from None

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


class Projections:
    """The projections of one student."""

    def __init__(self, base: Any, names: Sequence[str], width: int, *, seed: int) -> None:
        """Give the student projections [H, D] by name, drawn from `seed` alone; none where there are no names."""
        self._base = base
        self._modules = nn.ModuleDict()
        student_width = base.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(seed)
        device = base.get_input_embeddings().weight.device
        for name in names:
            with torch.random.fork_rng(devices=[]), torch.no_grad():  # the layer's own first weights are not used
                linear = nn.Linear(student_width, width, bias=False, dtype=torch.float32)
                linear.weight.copy_(torch.randn(width, student_width, generator=generator) / student_width**0.5)
            self._modules[name] = linear.to(device)
        if names:
            base.add_module(MODULE, self._modules)

    def projected(self, name: str, states: Tensor) -> Tensor:
        """Return [..., D] float32 projections of [..., H] states."""
        with torch.autocast(states.device.type, enabled=False):
            result: Tensor = self._modules[name](states.float())
        return result

    def remove(self) -> None:
        """Take the projections off the student, so that nothing of them is exported."""
        self._base._modules.pop(MODULE, None)

    def student_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a checkpoint's student: all but the projections'."""
        return {name: weight for name, weight in weights.items() if f"{MODULE}." not in name}

    def save(self, checkpoint: Path) -> None:
        """Write the projections into a checkpoint's directory; nothing where there are none."""
        from safetensors.torch import save_file

        if self._modules:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self._modules.state_dict().items()}
            save_file(weights, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Read the projections of a checkpoint back; nothing where the student has none.

        Raises:
            TrainingError: the checkpoint has other projections.
        """
        from safetensors.torch import load_file

        if not self._modules:
            return
        path = checkpoint / FILE
        if not path.is_file():
            raise TrainingError(
                f"{checkpoint} has no {FILE}, so it cannot be continued with its losses; remove the stage's directory"
            )
        try:
            self._modules.load_state_dict(load_file(path))
        except RuntimeError as error:
            reason = reason_of(error, 200)
            raise TrainingError(
                f"{path} holds other projections than the stage trains ({reason}); remove the stage's directory"
            ) from None

"""transformers.Trainer for a model that may have been sharded before it is given: saving, loading, norms of gradients.

Where the model is whole, everything is the stock Trainer. Where it is sharded, the stock Trainer is told that the model
looks after itself (as for models that transformers shards while loading), and weights and optimizer state are gathered
and saved in the files of one process, so that a run may go on with shards or without.
Cost: a gather of weights and state per checkpoint, in the first process's memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from shared.errors import TrainingError
from student_train.train.sharding import (
    is_sharded,
    load_optimizer_state,
    load_weights,
    whole,
    whole_optimizer_state,
    whole_weights,
)

_OPTIMIZER = "optimizer.pt"


class ShardedTrainer(Trainer):  # type: ignore[misc]
    """The stock Trainer, also over shards."""

    def __init__(self, model: Any, *args: Any, **settings: Any) -> None:
        """Take what the stock Trainer takes.

        Raises:
            TrainingError: this transformers cannot train a model that is sharded already.
        """
        self.holds_shards = is_sharded(model)
        super().__init__(model, *args, **settings)
        if self.holds_shards:
            if not hasattr(self, "is_distributed_loading_by_transformers"):
                raise TrainingError(
                    "trainer.fsdp needs transformers 5.19 or newer; upgrade it, or set trainer.fsdp to none"
                )
            self.is_distributed_loading_by_transformers = True

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Return all weights, gathered, where processes hold shards of them; None where they are whole."""
        return whole_weights(self.model) if self.holds_shards else None

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave shards where they are."""
        if not self.holds_shards:
            super()._move_model_to_device(model, device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm over all processes' shards."""
        return whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights."""
        if not self.holds_shards:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.whole_weights()
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save whole state; the scheduler is the same in every process."""
        if not self.holds_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load whole weights, each process its shards of them."""
        if not self.holds_shards:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        unknown = load_weights(self.model, _saved_weights(Path(resume_from_checkpoint)))
        assert not unknown, unknown

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load whole state, each process its shards of it."""
        if not self.holds_shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_state(
            self.optimizer, torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def _saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint by the model's names: those of the student, or of its adapter alone."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(path)
    if (checkpoint / "adapter_config.json").exists():  # peft leaves the adapter's name out
        return {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
    return weights

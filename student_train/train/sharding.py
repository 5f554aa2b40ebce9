"""Weights, gradients and optimizer state in shards over processes (FSDP2): for students that no single card holds.

Each decoder layer is a group of `torch.distributed.fsdp.fully_shard`, gathered before it runs and freed after;
embeddings, last norm and head form the root group, which stays whole from the forward pass to the end of the backward
pass, since the fused loss reads the head's weight itself. The same code runs on GPUs (nccl) and on CPUs (gloo), where
accelerate's own FSDP does not. Checkpoints hold whole tensors, as those of one process do.
Cost: memory of the weights and their state divided by the processes, plus the root group and one layer whole; two
gathers and one reduction of the weights per step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import TrainingError
from shared.recipe.recipe import StageTrainer, Student
from shared.recipe.sections.optimizers import OPTIMIZERS
from student_train.records.processes import is_first, num_processes
from student_train.student.decoder_layers import decoder_layers

_NO = ("", "no", "none", "false", "0")


def check_sharding(student: Student, trainer: StageTrainer) -> None:
    """Refuse what cannot be sharded, before anything is loaded.

    Raises:
        TrainingError: with the setting to change.
    """
    _check_launcher(trainer)
    check_shardable(student, trainer, num_processes())


def _check_launcher(trainer: StageTrainer) -> None:
    """Refuse what `accelerate launch` asks for in the environment where the recipe says something else: the trainer
    would follow it in silence.
    """
    precision = "bf16" if trainer.bf16 else "fp16" if trainer.fp16 else "no"
    for name, agreeing, instead in (
        ("ACCELERATE_USE_FSDP", _NO, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_USE_DEEPSPEED", _NO, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_USE_MEGATRON_LM", _NO, "set trainer.fsdp: full_shard"),
        ("ACCELERATE_MIXED_PRECISION", (precision, *_NO), "set trainer.bf16 or trainer.fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", _NO, "set trainer.torch_compile"),
    ):
        asked = os.environ.get(name, "")
        if asked.lower() not in agreeing:
            raise TrainingError(f"the launcher asks for {name}={asked}; unset it or start with torchrun, and {instead}")


def check_shardable(student: Student, trainer: StageTrainer, processes: int) -> None:
    """Refuse what so many processes cannot shard.

    Raises:
        TrainingError: with the setting to change.
    """
    if trainer.fsdp == "none":
        return
    if processes < 2:
        raise TrainingError(
            "trainer.fsdp is full_shard in a single process, where there is nothing to shard over; start the training "
            "with torchrun --nproc_per_node 2 or more, or set it to none"
        )
    if not OPTIMIZERS[trainer.optim].is_elementwise:
        sharded = ", ".join(name for name, optimizer in OPTIMIZERS.items() if optimizer.is_elementwise)
        raise TrainingError(
            f"trainer.optim {trainer.optim} does not work on shards of weights (trainer.fsdp: full_shard); choose "
            f"one of {sharded}"
        )
    if student.adapter.holds_4_bits:
        raise TrainingError(
            "4-bit weights cannot be sharded (trainer.fsdp: full_shard); train with adapter: lora, or set fsdp: none"
        )
    if trainer.torch_compile or trainer.fp16:
        name = "torch_compile" if trainer.torch_compile else "fp16"
        raise TrainingError(
            f"trainer.{name} is not supported together with trainer.fsdp: full_shard; set one of the two back"
        )


def shard(model: Any, base: Any, device: torch.device) -> None:
    """Shard `model`, which is `base` or `base` with an adapter, over all processes, in place.

    Raises:
        TrainingError: the model does not say which of its modules are layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_processes(),))
    for layer in decoder_layers(base, "trainer.fsdp: full_shard"):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds only shards of a model's weights."""
    return any(_is_shard(parameter) for parameter in model.parameters())


def _is_shard(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Any) -> Any:
    """Return a tensor gathered from all processes, on the CPU; what is no shard comes back as it is. Every process must
    call it.
    """
    return value.detach().full_tensor().cpu() if _is_shard(value) else value


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight and buffer by name, gathered, tied weights once; empty beside the first process.

    Every process must call it.
    """
    _free_gathered(model)
    seen: set[int] = set()
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            gathered = whole(value)
            if is_first():
                weights[name] = gathered
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Put whole weights into a sharded model, each process its own part; return names that the model does not have."""
    _free_gathered(model)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in weights.items():
            if name in own:
                own[name].copy_(as_shard(weight, own[name]))
    return [name for name in weights if name not in own]


def _free_gathered(model: nn.Module) -> None:
    """Let a model's parameters be its shards again, where an evaluation has left the root group whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def as_shard(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, placed as `like` is."""
    if not _is_shard(like):
        return value
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = like
    assert all(isinstance(placement, Shard) for placement in sharded.placements)
    shape, offset = compute_local_shape_and_global_offset(value.shape, sharded.device_mesh, sharded.placements)
    part = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = part.contiguous().to(sharded.to_local().device)
    return type(sharded).from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state dict with every tensor gathered, as one process saves it; without them beside the
    first process.

    Every process must call it.
    """
    state = optimizer.state_dict()
    values: dict[int, dict[str, Any]] = {}
    for number, own in state["state"].items():
        for name, value in own.items():
            gathered = whole(value)
            if is_first():
                values.setdefault(number, {})[name] = gathered
    return {**state, "state": values}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give an optimizer over shards the state that `whole_optimizer_state` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {
            name: as_shard(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})

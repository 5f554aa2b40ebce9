"""What goes wrong inside the stock Trainer, said in one sentence with the setting to change."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from shared.errors import TrainingError, reason_of
from shared.recipe.recipe import StageTrainer
from shared.recipe.sections.optimizers import OPTIMIZERS


def check_installed(trainer: StageTrainer) -> None:
    """Refuse an optimizer or a reporter whose package is missing.

    Raises:
        TrainingError: one is.
    """
    optimizer = OPTIMIZERS[trainer.optim]
    if optimizer.package is not None and importlib.util.find_spec(optimizer.package) is None:
        raise TrainingError(
            f"trainer.optim is {trainer.optim}, which needs the package {optimizer.package}; install it "
            "(decant-kd[gpu] has bitsandbytes), or set it to adamw_torch"
        )
    if optimizer.is_paged and not torch.cuda.is_available():
        raise TrainingError(
            f"trainer.optim is {trainer.optim}, whose pages need an NVIDIA GPU; use adamw_8bit, which needs none, or "
            "adamw_torch"
        )
    for name in trainer.report_to:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise TrainingError(f"trainer.report_to names {name}, which is not installed; install it, or leave it out")


def check_optimizer(trainer: StageTrainer, args: TrainingArguments) -> None:
    """Let an optimizer of another package make a step on this machine.

    Raises:
        TrainingError: it cannot, as one whose kernels need a GPU.
    """
    if OPTIMIZERS[trainer.optim].package is None:
        return
    from transformers import Trainer

    with setting_explained("optim", trainer.optim):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        weight = torch.nn.Parameter(torch.zeros(64, 128, device=args.device))
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight], **options)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        optimizer.step()


def check_dense_gradients(trainer: StageTrainer, model: torch.nn.Module) -> None:
    """Refuse an optimizer that makes the weights of rare tokens explode, where such are trained.

    Raises:
        TrainingError: they are.
    """
    embeddings = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    if OPTIMIZERS[trainer.optim].loses_rare_tokens and any(weight.requires_grad for weight in embeddings):
        raise TrainingError(
            f"trainer.optim is {trainer.optim}, which keeps the mean squares of gradients of embeddings in 8 bits too: "
            "those of rare tokens become 0 and their weights explode; use adamw_8bit, which keeps them in 32 bits, or "
            "adamw_torch, or train an adapter"
        )


def check_schedule(trainer: StageTrainer) -> None:
    """Refuse a schedule of the learning rate that cannot be made of its options.

    Raises:
        TrainingError: it cannot.
    """
    from transformers.optimization import get_scheduler

    if trainer.lr_scheduler_kwargs and trainer.lr_scheduler_type in ("constant", "constant_with_warmup"):
        raise TrainingError(
            f"trainer.lr_scheduler_type {trainer.lr_scheduler_type} has no options, and lr_scheduler_kwargs gives it "
            f"{trainer.lr_scheduler_kwargs}; leave them out, or choose another schedule"
        )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=trainer.learning_rate)
    with setting_explained("lr_scheduler_type", described_schedule(trainer.lr_scheduler_type, trainer)):
        get_scheduler(
            trainer.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(trainer.lr_scheduler_kwargs),
        )


def described_schedule(kind: str, trainer: StageTrainer) -> str:
    """Name a schedule with its options."""
    return f"{kind} with {trainer.lr_scheduler_kwargs or 'no options'}"


def check_precision(trainer: StageTrainer) -> None:
    """Refuse arithmetic that needs an NVIDIA GPU where there is none.

    Raises:
        TrainingError: there is none.
    """
    if trainer.tf32 and not torch.cuda.is_available():
        raise TrainingError("trainer.tf32 is set where there is no NVIDIA GPU; leave it out")
    if trainer.fp16 and not torch.cuda.is_available():
        raise TrainingError("trainer.fp16 is set where there is no NVIDIA GPU; leave it out, or use bf16")


@contextmanager
def explained(trainer: StageTrainer) -> Iterator[None]:
    """Turn what building an optimizer or a schedule, or a full card, raises into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"the GPU's memory is full with {trainer.per_device_train_batch_size} packs of {trainer.pack_tokens} "
            "tokens; lower pack_tokens or per_device_train_batch_size, set gradient_checkpointing, or train an adapter "
            "(`decant plan --card`)"
        ) from None


@contextmanager
def setting_explained(name: str, value: str) -> Iterator[None]:
    """Turn what a setting's own code raises into a sentence that names the setting."""
    try:
        yield
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"trainer.{name} {value} cannot be used: {reason_of(error, 200)}; choose another, or correct its options"
        ) from None


@contextmanager
def writing_explained(directory: str) -> Iterator[None]:
    """Turn what a full disk makes of saving a checkpoint into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = reason_of(error, 200)
        raise TrainingError(
            f"a checkpoint cannot be written in {directory}: {reason}; free some space or correct its permissions, "
            "then run the same command again"
        ) from None

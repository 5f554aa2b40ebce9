"""A stage's trainer section as transformers.TrainingArguments, with what exact resume and packing fix for every run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from shared.errors import TrainingError, reason_of
from shared.recipe.recipe import StageTrainer
from student_train.records.processes import num_processes
from student_train.train.training_problems import check_installed, check_optimizer, check_precision, check_schedule

_AS_WRITTEN = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "tf32",
    "save_steps",
    "logging_steps",
    "dataloader_num_workers",
)
"""Fields that transformers spells and means the same way."""


def training_arguments(
    trainer: StageTrainer, stage_dir: Path, seed: int, num_steps: int, *, gradient_checkpointing: bool
) -> TrainingArguments:
    """Return the arguments of one stage of `num_steps` optimizer steps.

    The dataset is one epoch of planned packs, so steps alone decide; old checkpoints are removed by this project's own
    rule, after the new one's marker; losses are never filtered.

    Raises:
        TrainingError: transformers or this machine cannot honour an argument.
    """
    check_installed(trainer)
    check_precision(trainer)
    check_schedule(trainer)
    settings: dict[str, Any] = {name: getattr(trainer, name) for name in _AS_WRITTEN}
    if trainer.tf32 is None or not torch.cuda.is_available():
        del settings["tf32"]
    try:
        args = TrainingArguments(
            output_dir=str(stage_dir),
            max_steps=num_steps,
            num_train_epochs=1,
            warmup_steps=trainer.warmup_steps or math.ceil(trainer.warmup_ratio * num_steps),
            lr_scheduler_kwargs=dict(trainer.lr_scheduler_kwargs),
            seed=seed,
            data_seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
            save_strategy="steps",
            save_total_limit=None,
            logging_strategy="steps",
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            report_to=[name for name in trainer.report_to if name == "wandb"],
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            log_level="error",
            **settings,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        count = num_processes()
        started = f", or start the {count} processes that WORLD_SIZE says with torchrun" if count > 1 else ""
        raise TrainingError(
            f"the trainer section cannot be honoured here: {reason_of(error)}; correct or leave it out{started}"
        ) from None
    check_optimizer(trainer, args)
    args._n_gpu = min(
        args.n_gpu, 1
    )  # several GPUs in one process would mean replicas that split flat packs; use torchrun
    return args

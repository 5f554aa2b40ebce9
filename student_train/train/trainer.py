"""transformers.Trainer with planned packs, exact step metrics and checkpoints that are whole or absent.

What is added: packs come in planned order; loss terms are set per step from their schedules; each optimizer step's
values go to metrics.jsonl as computed, not as a running average; a checkpoint counts once its marker is written.
Everything else is the stock Trainer, including its loop, optimizer, precision, accumulation and random state.
Cost over the stock Trainer: one small transfer from the device per logged step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from shared.errors import TrainingError
from shared.models.weights.weight_headers import stored_tensors
from shared.process.failpoints import failpoint
from shared.progress import Progress
from student_train.batch.collate import collate
from student_train.batch.dataset import PackDataset
from student_train.evaluate.evaluation_run import evaluation_line, reported_figures, show_samples
from student_train.evaluate.heldout_measure import Processes
from student_train.operator.loss_terms import term_keys
from student_train.records.checkpoints import complete_checkpoint, damage, list_checkpoints, rotate_checkpoints
from student_train.records.metrics_log import StepLog, flattened, read_steps
from student_train.records.processes import wait_for_all
from student_train.student.forward_patch import GRADIENT_SQUARE, Objective
from student_train.student.student import check_recomputes
from student_train.train.averaged_weights import averaged, settle
from student_train.train.gradient_watch import DivergedError, GradientWatch
from student_train.train.read_ahead import ReadAhead
from student_train.train.sharded_trainer import ShardedTrainer
from student_train.train.stage_schedule import StageSchedule
from student_train.train.stochastic_rounding import StochasticRounding
from student_train.train.training_problems import (
    check_dense_gradients,
    described_schedule,
    setting_explained,
    writing_explained,
)


class DistilTrainer(ShardedTrainer):
    """The Trainer of one stage."""

    loss_is_scaled_for_ga = True
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        dataset: PackDataset,
        objective: Objective,
        schedule: StageSchedule,
        *,
        belongs_to: Mapping[str, str],
        progress: Progress,
        on_checkpoint: Callable[[], None],
        callbacks: Sequence[Any] = (),
    ) -> None:
        """Prepare training of a patched `model` on the packs of `dataset`.

        Args:
            model: its forward is patched with `objective`.
            args: from `training_arguments`.
            dataset: packs in order.
            objective: receives the terms of each step, returns its values.
            schedule: loss terms per step, evaluations, what moves the mixture; its stage says which checkpoints to keep
                and which norms of the gradients are too large.
            belongs_to: what a checkpoint records and a resumed run must match.
            progress: told of every step.
            on_checkpoint: called after each complete checkpoint.
            callbacks: further callbacks of the Trainer.
        """
        reads_ahead = args.dataloader_num_workers == 0 and dataset.plan.is_complete
        self._ahead = None if not reads_ahead else ReadAhead(dataset, args.train_batch_size, args.world_size)
        packs = self._ahead or dataset
        super().__init__(model=model, args=args, train_dataset=packs, data_collator=collate, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)
        self._objective = objective
        self._schedule = schedule
        self._belongs_to = belongs_to
        settings = schedule.stage.trainer
        self._keep_checkpoints = settings.save_total_limit
        self._watch = GradientWatch(settings.max_grad_norm_factor, scales_loss=settings.fp16)
        self._progress = progress
        self._on_checkpoint = on_checkpoint
        self._evaluation = schedule.evaluation
        if self._evaluation is not None:
            self.add_callback(_EvaluateFirst(self._evaluate_student))
        self._dataset = dataset
        self._plan = dataset.plan
        self._step_values: dict[str, float] = {}
        self._num_positions = 0
        self._last_written = 0
        self._step_started = time.perf_counter()
        self._waited = 0.0
        self._seconds_of_run, self._waited_of_run = 0.0, 0.0
        self._logs: tuple[StepLog, ...] = ()

    def run(self, checkpoint: Path | None, step: int) -> None:
        """Train to the end, from a complete checkpoint of `step` steps or from the start.

        Raises:
            DivergedError: a loss or a gradient is not finite, or gradients explode.
        """
        directory = Path(self.args.output_dir)
        if self.is_world_process_zero():
            self._logs = StepLog(directory / "metrics.jsonl", step), StepLog(directory / "timing.jsonl", step)
        if self._evaluation is not None:
            self._evaluation.open(directory, None if checkpoint is None else step, writes=self.is_world_process_zero())
        if checkpoint is not None:
            if not self._watch.restore(checkpoint):  # of an earlier version: what was logged is all that is known
                for record in read_steps(directory / "metrics.jsonl"):
                    if record["step"] <= step:
                        self._watch.see(math.nan if record["grad_norm"] is None else record["grad_norm"])
            self._schedule.restore(checkpoint)
        self._last_written = step
        self._step_started = time.perf_counter()
        try:
            if checkpoint is not None and self._evaluation is not None and self._evaluation.verdict.stops:
                self._load_from_checkpoint(str(checkpoint))  # it stopped here; only its model was not saved yet
                self.state.global_step = step
            else:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                settle(self.optimizer)
        finally:
            for log in self._logs:
                log.close()
            if self._evaluation is not None:
                self._evaluation.close()
            if self._ahead is not None:
                self._ahead.close()
        if self._seconds_of_run:
            self._progress.note(
                f"waited for data in {self._waited_of_run / self._seconds_of_run:.2%} of the steps' time"
            )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the batches of a step, and measure how long that takes."""
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def recompute_activations(self, base: Any) -> None:
        """Recompute activations in the backward pass from now on; `base` is the model below any adapter.

        Raises:
            TrainingError: it cannot.
        """
        check_recomputes(base)
        self.args.gradient_checkpointing = True
        self.args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.model is not base:
            base.enable_input_require_grads()  # frozen embeddings would leave nothing to recompute for
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs)

    def forget_measured(self) -> None:
        """Forget what a forward pass outside the training recorded; the next one has the terms of its step again."""
        self._objective.take()

    def prepare_terms(self) -> None:
        """Set the loss terms of the step to come; a pass with them costs what the dearest does, one that measures
        gradients.
        """
        self._objective.terms = self._schedule.terms_at(self.state.global_step)
        self._objective.measures_gradients = self._schedule.wants_gradient_norms(0)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer that the recipe names.

        Raises:
            TrainingError: it cannot be made, or cannot train these weights.
        """
        if self.optimizer is not None:
            return self.optimizer
        check_dense_gradients(self._schedule.stage.trainer, self.model)
        with setting_explained("optim", self._schedule.stage.trainer.optim):
            optimizer = super().create_optimizer(model)
        if self._schedule.stage.trainer.rounding == "stochastic":
            self.optimizer = StochasticRounding(optimizer, int(self.args.seed), lambda: int(self.state.global_step))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning-rate schedule that the recipe names."""
        trainer = self._schedule.stage.trainer
        name = described_schedule(trainer.lr_scheduler_type, trainer)
        with setting_explained("lr_scheduler_type", name):
            return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Keep the planned order; the stock sampler would shuffle it."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass with the loss terms of the current step."""
        self._objective.terms = self._schedule.terms_at(self.state.global_step)
        self._objective.measures_gradients = self._schedule.wants_gradient_norms(self.state.global_step)
        self._num_positions = num_items_in_batch
        return super().training_step(model, inputs, num_items_in_batch)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Write the step's exact values before the stock Trainer logs and saves."""
        if self.state.global_step > self._last_written:
            self._write_step(grad_norm, learning_rate)
            self._evaluate_when_due()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _write_step(self, grad_norm: Any, learning_rate: float | None) -> None:
        """Append the lines of the optimizer step that has just been made."""
        step = self.state.global_step
        values = self._measured()
        loss = values.pop("loss")
        norms = {
            name.removeprefix(GRADIENT_SQUARE): values.pop(name) ** 0.5
            for name in list(values)
            if GRADIENT_SQUARE in name
        }
        schedule = self._schedule_of_step(step)
        tokens = sum(schedule["tokens_by_source"].values())
        schedule |= self._schedule.observe(values, norms or None)
        self._step_values = {**values, **flattened(schedule, tokens)}
        self._last_written = step
        seconds = time.perf_counter() - self._step_started
        self._step_started += seconds
        rate = "" if learning_rate is None else f", learning rate {learning_rate:.2e}"
        self._progress.advance(1, tokens, f"loss {loss:.4f}{rate}")
        norm = None if grad_norm is None else float(grad_norm)
        reason = self._divergence(loss, norm)
        if self._logs and (self._is_logged(step) or reason is not None):
            metrics, timing = self._logs
            metrics.write(
                {
                    "step": step,
                    "epoch": self._plan.epoch_at(step),
                    "loss": loss,
                    "terms": values,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    "positions": int(self._num_positions),
                    "tokens": tokens,
                    **schedule,
                }
            )
            waited = {"seconds": seconds, "waited_seconds": self._waited, "tokens_per_second": tokens / seconds}
            timing.write({"step": step, **waited})
        self._seconds_of_run += seconds
        self._waited_of_run += self._waited
        self._waited = 0.0
        if reason is not None:
            raise DivergedError(f"step {step}: {reason}, so the training has diverged; {self._what_is_left()}")
        failpoint("train_step.after_write")

    def _schedule_of_step(self, step: int) -> dict[str, Any]:
        """Return weight and temperature of each term, and tokens by source, of an optimizer step counted from 1."""
        terms = self._objective.terms
        keys = term_keys(terms)
        return {
            "weights": {key: term.weight for key, term in zip(keys, terms, strict=True)},
            "temperatures": {key: term.temperature for key, term in zip(keys, terms, strict=True)},
            "tokens_by_source": self._dataset.tokens_by_source(step),
        }

    def _evaluate_when_due(self) -> None:
        """Evaluate after the steps that the recipe names; save a new best, and stop when the patience is used up."""
        if self._evaluation is None or not self._evaluation.is_due(self.state.global_step, int(self.state.max_steps)):
            return
        self._evaluate_student()
        stops = self._evaluation.verdict.stops
        if stops or (self._evaluation.settings.keep_best and self._evaluation.is_best):
            self.control.should_save = True
        if stops:
            self.control.should_training_stop = True

    def _evaluate_student(self) -> None:
        """Evaluate the student as it is now, in the log and wherever metrics go."""
        assert self._evaluation is not None
        share = Processes(self.args.process_index, self.args.world_size, self.args.device, self._summed)
        with averaged(self.optimizer):
            figures, samples = self._evaluation.evaluate(self.state.global_step, self.model, share)
        self._progress.note(evaluation_line(figures))
        self._schedule.follow(figures)
        self.log(reported_figures(figures))
        show_samples(samples, self.callback_handler.callbacks)
        self._step_started = time.perf_counter()

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    def _step_to_keep(self) -> int | None:
        keeps_best = self._evaluation is not None and self._evaluation.settings.keep_best
        return self._evaluation.verdict.best_step if self._evaluation is not None and keeps_best else None

    def load_best(self) -> int | None:
        """Load the weights of the best checkpoint, where the recipe wants them; return their step.

        Raises:
            TrainingError: it is gone or was altered since it was written.
        """
        step = self._step_to_keep()
        if step is not None and step != self.state.global_step:
            kept = [one for one in list_checkpoints(Path(self.args.output_dir)) if one.step == step]
            problem = damage(kept[0]) if kept else f"the checkpoint of step {step} is gone"
            if problem is not None:
                raise TrainingError(
                    f"{problem}; it holds the stage's best student, so run the same command again, which goes on from "
                    "a checkpoint before it"
                )
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{step}"))
        return step

    def _divergence(self, loss: float, norm: float | None) -> str | None:
        reason = None if norm is None else self._watch.see(norm)
        return reason if math.isfinite(loss) else f"the loss is {loss}"

    def _what_is_left(self) -> str:
        directory = Path(self.args.output_dir)
        kept = list_checkpoints(directory)
        state = (
            f"the state after step {kept[-1].step} is kept in {kept[-1].path}"
            if kept
            else "no checkpoint had been written yet"
        )
        return (
            f"{state}; lower trainer.learning_rate, lengthen its warm-up or clip with trainer.max_grad_norm, then "
            f"remove or rename {directory} and train the stage again"
        )

    def _is_logged(self, step: int) -> bool:
        return step % int(self.args.logging_steps) == 0 or step == int(self.state.max_steps)

    def _measured(self) -> dict[str, float]:
        """Return the step's values summed over forward passes and processes."""
        sums = self._objective.take()
        names = list(sums)
        stacked = torch.stack([sums[name] for name in names])
        return dict(zip(names, self._summed(stacked).tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send each term's value to TensorBoard and others along with the loss."""
        if "loss" in logs:
            logs = {**logs, **self._step_values}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights alone: no pickled arguments, no tokenizer in every checkpoint."""
        if self.args.should_save:
            model, directory = self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
            layers = self._objective.layers
            if layers is not None and state_dict is None:
                state_dict = layers.projections.student_weights(model.state_dict())
            # by the model's own names: a checkpoint is read back as it is, without putting experts together again
            form = {"save_original_format": False} if isinstance(model, PreTrainedModel) else {}
            model.save_pretrained(directory, state_dict=state_dict, **form)
            if layers is not None:
                layers.projections.save(Path(directory))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, and the learned projections of losses on a hidden layer.

        Raises:
            TrainingError: the checkpoint has weights of other names, which would be left as they are in silence.
        """
        checkpoint, own = Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model)
        if isinstance(own, PreTrainedModel):
            unknown = stored_tensors(checkpoint).keys() - set(own.state_dict())
            if unknown:
                raise TrainingError(
                    f"{checkpoint} holds weights by other names than the student ({min(unknown)}), as earlier versions "
                    "saved experts; remove the stage's directory to train it again"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._objective.layers is not None:
            self._objective.layers.projections.load(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, mark it complete, then remove older ones; none while the gradients are suspicious."""
        step = self.state.global_step
        is_needed = step >= self.state.max_steps or self.control.should_training_stop or step == self._step_to_keep()
        if self._watch.num_suspicious and not is_needed:
            return
        for log in self._logs:
            log.sync()
        if self._evaluation is not None:
            self._evaluation.sync()
        settle(self.optimizer)
        with writing_explained(self.args.output_dir):
            super()._save_checkpoint(model, trial)
        wait_for_all()
        if self.args.should_save:
            directory = Path(self.args.output_dir)
            self._schedule.save(directory / f"checkpoint-{step}")
            self._watch.save(directory / f"checkpoint-{step}")
            complete_checkpoint(directory / f"checkpoint-{step}", self._belongs_to)
            rotate_checkpoints(directory, self._keep_checkpoints, self._step_to_keep())
        wait_for_all()
        self._on_checkpoint()


class _EvaluateFirst(TrainerCallback):  # type: ignore[misc]
    """Evaluates before the first step, once the model is where it trains."""

    def __init__(self, evaluate: Callable[[], None]) -> None:
        self._evaluate = evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, unless the training goes on from a checkpoint."""
        if state.global_step == 0:
            self._evaluate()

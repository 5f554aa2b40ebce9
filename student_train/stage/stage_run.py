"""Train one stage: reuse it where it is finished, continue it where it was killed, refuse it where the recipe has
changed.

Cost: the training.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from shared.atomic import write_atomic
from shared.cache.chat_settings import ChatSettings, chat_settings_of
from shared.cache.tokenizer_files import checked_tokenizer, tokenizer_without_code
from shared.errors import TrainingError
from shared.models.gpus import unused_gpu
from shared.models.load_report import without_bars
from shared.progress import NOWHERE, Progress
from shared.recipe.base import quoted
from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe, Stage
from shared.recipe.sections.training import recomputation
from student_train.batch.dataset import PackDataset
from student_train.evaluate.evaluation_run import EvaluationRun, evaluations_until
from student_train.evaluate.verdict import Verdict, judge
from student_train.fit.disk_space import check_disk_space
from student_train.fit.first_step import fit_first_step
from student_train.fit.precision import precision_notes
from student_train.layers.layer_losses import LayerLosses, check_layer_losses
from student_train.operator.operator_choice import operator_for
from student_train.order.order import length_limit
from student_train.records.checkpoints import (
    Checkpoint,
    list_checkpoints,
    newest_checkpoint,
    put_damaged_aside,
    remove_incomplete,
    rotate_checkpoints,
)
from student_train.records.health import health_of
from student_train.records.metrics_log import read_steps
from student_train.records.one_training import only_training
from student_train.records.processes import first_then_others, is_first, wait_for_all
from student_train.records.run_seconds import SecondsLog
from student_train.stage.export import export_student, make_savable
from student_train.stage.stage_identity import DONE_FILE, checkpoint_of, claim_stage, lost_since, mark_done
from student_train.stage.stage_work import StageWork, resolve_stage
from student_train.student.decoder_layers import compile_layers
from student_train.student.forward_patch import Objective, patch_forward, restore_forward
from student_train.student.liger import check_liger, liger_layers
from student_train.student.row_attention import switch_attention
from student_train.student.row_separation import separate_rows
from student_train.student.rows_alone import are_rows_alone
from student_train.student.student import add_adapter, check_recomputes, load_student
from student_train.student.student_head import body_of, check_head, head_of
from student_train.train.gradient_watch import DivergedError
from student_train.train.sharding import check_sharding, load_weights, shard
from student_train.train.stage_schedule import StageSchedule
from student_train.train.trainer import DistilTrainer
from student_train.train.training_arguments import training_arguments
from student_train.train.training_problems import explained


def run_stage(recipe: Recipe, stage: Stage, patch: Callable[[Any, Objective], None] = patch_forward) -> Path:
    """Train one stage, or reuse or continue what is there, and return its model's directory; `patch` makes the student
    return the loss of a batch.

    Raises:
        TrainingError: it cannot start, its directory holds another stage, the disk is too small, a GPU would not be
            used, another process trains it, or it has diverged.
        CacheError: a cache cannot be opened, or is of another tokenizer than the student.
    """
    assert stage.rounds is None, f"stage '{stage.name}' is trained round by round, each a stage of its own"
    work = replace(resolve_stage(recipe, stage), patch=patch)
    args = arguments_of(work)  # joins the other processes, where there are any
    if first_then_others(lambda: claim_stage(work)):
        return _reused(work)
    with only_training(work.directory) if is_first() else nullcontext():
        if first_then_others(lambda: claim_stage(work)):  # by a process that trained it until now
            return _reused(work)
        return _run(work, args)


def _reused(work: StageWork) -> Path:
    """Say that a stage was finished before; return its model's directory."""
    model_dir = work.directory / "model"
    with _display(work, done=work.plan.num_steps) as progress:
        progress.note(f"{progress.phase}: finished before with the same settings, {model_dir} is reused")
    return model_dir


def _display(work: StageWork, done: int) -> Progress:
    stream = None if is_first() else NOWHERE
    return Progress(f"train {work.stage.name}", work.plan.num_steps, done=done, unit="steps", stream=stream)


def _run(work: StageWork, args: TrainingArguments) -> Path:
    """Train a stage that this process has claimed, and holds, from its newest checkpoint."""
    recipe, stage, total = work.recipe, work.stage, work.plan.num_steps
    phase = f"train {stage.name}"
    problem = unused_gpu()
    if problem is not None:
        raise TrainingError(f"stage '{stage.name}' would train on the CPU: {problem}")
    tokenizer_without_code(work.caches.caches[0].path)  # the export needs it: found out now, not after the last step
    if is_first():
        write_atomic(work.directory / "recipe.yaml", dump_recipe(recipe).encode(), what="recipe")
        remove_incomplete(work.directory)
    damaged = first_then_others(lambda: _tidy(work))
    checkpoint = newest_checkpoint(work.directory, checkpoint_of(work))
    seconds = SecondsLog(recipe.output_dir, f"train.{stage.name}")
    progress = _display(work, done=checkpoint.step if checkpoint else 0)
    if damaged is not None:
        progress.note(f"{phase}: {damaged}")
    if (work.directory / DONE_FILE).exists():
        lost = lost_since(work.directory)
        progress.note(f"{phase}: finished before, but its model is not whole now and is made again: {lost}")
    progress.note(_description(work, checkpoint))
    for said in precision_notes(stage, work.student, on_gpu=args.device.type == "cuda"):
        progress.note(f"{phase}: {said}")
    is_saved, stopped = False, None
    try:
        with _deterministic(), without_bars(), explained(stage.trainer):
            _train_and_export(work, args, checkpoint, progress, seconds)
        is_saved = True
    except DivergedError as error:
        stopped = str(error)
        raise
    finally:
        if is_first():
            _write_health(work, model_saved=is_saved, stopped=stopped)
            seconds.save()
        progress.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if is_first():
        mark_done(work, _verdict(work, total).stopped_at or total)
    wait_for_all()
    return work.directory / "model"


def _tidy(work: StageWork) -> str | None:
    """Put damaged checkpoints aside, and remove those that a run would have removed, had it not been killed before.

    Returns:
        A sentence on what was damaged, or None.
    """
    keeps_best = work.stage.evaluate is not None and work.stage.evaluate.keep_best

    def best(step: int) -> int | None:
        return _verdict(work, step).best_step if keeps_best else None

    damaged = put_damaged_aside(work.directory, best)
    checkpoints = list_checkpoints(work.directory)
    if checkpoints and is_first():
        rotate_checkpoints(work.directory, work.stage.trainer.save_total_limit, best(checkpoints[-1].step))
    return damaged


def _verdict(work: StageWork, step: int) -> Verdict:
    settings = work.stage.evaluate
    return judge(evaluations_until(work.directory, step), settings.early_stopping if settings else None)


def arguments_of(work: StageWork) -> TrainingArguments:
    """Return the Trainer's arguments for a stage."""
    check_sharding(work.student, work.stage.trainer)
    check_liger(wanted=work.student.liger)
    check_layer_losses(work.stage, work.student)
    return training_arguments(
        work.stage.trainer, work.directory, work.seed, work.plan.num_steps, gradient_checkpointing=_recomputes(work)
    )


def _recomputes(work: StageWork) -> bool:
    """Tell whether the recipe says so; `auto` is decided once the student is on its card."""
    return recomputation(work.student, work.stage.trainer) is True


def _description(work: StageWork, checkpoint: Checkpoint | None) -> str:
    """Return what a stage trains on, and what it leaves out, in one line."""
    plan, caches = work.plan, work.caches
    cut = sum(epoch.num_cut for epoch in plan.epochs)
    dropped = sum(epoch.num_dropped for epoch in plan.epochs)
    repeats, others = int(caches.repeats.sum()), int(caches.other_answers.sum())
    to_come = sum(cache.parts_to_come for cache in caches.caches)
    is_short = plan.limit < length_limit(work.stage.trainer.pack_tokens, work.stage.max_length)
    reason = ", the positions that the student knows" if is_short else ""
    full = f", {plan.fill:.1%} full" if plan.epochs else ""
    said: list[tuple[object, str]] = [
        (True, f"{plan.num_steps:,} steps of {plan.packs_per_step} packs{full}"),
        (work.sampling, "mixture follows the evaluations"),
        (True, f"{plan.epoch_at(plan.num_steps):.3g} epochs"),
        (cut, f"{cut:,} rows cut to {plan.limit} tokens{reason}"),
        (
            work.num_unlabelled,
            f"{work.num_unlabelled:,} rows cut before the first token that is trained, so nothing is learned of them",
        ),
        (dropped, f"{dropped:,} rows above {plan.limit} tokens{reason} dropped"),
        (repeats, f"{repeats:,} rows left out that an earlier cache holds"),
        (others, f"{others:,} rows left out that were drawn or rendered otherwise (`answers: all` keeps them)"),
        (caches.all_are_other, "on rows that were drawn or rendered otherwise than the recipe says"),
        (to_come, f"without {to_come:,} planned parts of rows, which `decant teach` has not built yet"),
        (work.untaught, f"no teacher for {quoted(work.untaught)}, whose rows train the other losses alone"),
        (work.start, f"started from {work.start}"),
        (checkpoint, f"continued after step {checkpoint.step:,}" if checkpoint else ""),
    ]
    return f"train {work.stage.name}: {', '.join(text for holds, text in said if holds)}"


def _train_and_export(
    work: StageWork,
    args: TrainingArguments,
    checkpoint: Checkpoint | None,
    progress: Progress,
    seconds: SecondsLog,
) -> None:
    """Load the student, train it to the stage's last step and write its model's directory."""
    phase, base = f"train {work.stage.name}", load_student(work.student, work.start, work.caches, seed=work.seed)
    make_savable(base)
    with liger_layers(base, wanted=work.student.liger):
        done = checkpoint.step if checkpoint else 0
        trainer, objective = assemble(work, args, base, progress, done=done, on_checkpoint=seconds.save)
        model = trainer.model
        if are_rows_alone(body_of(base)):
            progress.note(
                f"{phase}: layers of {type(base).__name__} do not keep the rows of a pack apart, so each length of "
                "rows runs alone"
            )
        adapted = not work.student.adapter.trains_all_weights
        check_disk_space(model, work.stage, work.plan.num_steps, work.directory, adapted=adapted)
        first = fit_first_step(work, trainer, base, work.directory / "memory.json" if is_first() else None)
        if first is not None:
            progress.note(f"{phase}: {first.text()}")
        trainer.run(checkpoint.path if checkpoint else None, done)
        best = trainer.load_best()
        if best is not None:
            progress.note(f"{phase}: the model is that of step {best:,}, whose held-out KL is the lowest")
        gathered = trainer.whole_weights()
        restore_forward(base)
        if objective.layers is not None:
            objective.layers.remove()
        switch_attention(base, work.student.attention)
        if is_first():
            if gathered is not None:
                fresh = load_student(work.student, work.start, work.caches, seed=work.seed)
                model = add_adapter(fresh, work.student.adapter)
                load_weights(model, gathered)
            with checked_tokenizer(work.caches.caches[0].path) as tokenizer_dir:
                export_student(
                    model,
                    work.student,
                    work.origin,
                    tokenizer_dir,
                    work.directory,
                    lambda tokenizer: _chat_settings(work, tokenizer, progress),
                )
        wait_for_all()


def assemble(
    work: StageWork,
    args: TrainingArguments,
    base: Any,
    progress: Progress,
    *,
    done: int = 0,
    on_checkpoint: Callable[[], None] = lambda: None,
) -> tuple[DistilTrainer, Objective]:
    """Return the trainer of a stage over a loaded student, with adapter, loss, packs, schedules and evaluations; and
    what it minimises.

    Args:
        work: the stage.
        args: `arguments_of` it.
        base: the student without its adapter; its forward is patched.
        progress: is told of every step.
        done: steps of the checkpoint that it will continue from.
        on_checkpoint: called after each checkpoint, by the first process.

    Raises:
        TrainingError: the student cannot be trained as the stage wants it.
    """
    model, objective = _student(work, args, base)
    trainer = DistilTrainer(
        model,
        args,
        PackDataset(work.caches, work.plan, work.temperatures, work.hidden, packs_per_pass=_packs_per_pass(args)),
        objective,
        StageSchedule(work.stage, work.plan.num_steps, work.run, _evaluation(work, base, objective), work.sampling),
        belongs_to=checkpoint_of(work),
        progress=progress,
        on_checkpoint=on_checkpoint if is_first() else lambda: None,
        callbacks=_callbacks(work, done) if is_first() else [],
    )
    return trainer, objective


def _packs_per_pass(args: TrainingArguments) -> int:
    """Return how many packs all processes pass forward at a time; 1 alone, where the last pass may have fewer."""
    return args.train_batch_size * args.world_size if args.world_size > 1 else 1


def _chat_settings(work: StageWork, tokenizer: Any, progress: Progress) -> ChatSettings:
    """Return what leaves with the model besides its weights; say where the sources do not agree."""
    settings = chat_settings_of(work.recipe, work.caches.caches, tokenizer)
    if settings.note:
        progress.note(f"train {work.stage.name}: {settings.note}")
    return settings


def _student(work: StageWork, args: TrainingArguments, base: Any) -> tuple[Any, Objective]:
    """Patch the forward of the student's base model; return it with its adapter, and what it minimises."""
    shards = work.stage.trainer.fsdp == "full_shard"
    if not work.student.adapter.holds_4_bits and not shards:
        base.to(args.device)
    if _recomputes(work):
        check_recomputes(base)
    head = head_of(base, work.caches.vocab_size)
    check_head(base, head)
    if separate_rows(base, head.vocab_size, longest=_longest_row(work)) == "alone":
        _check_rows_alone(work, base)
    model = add_adapter(base, work.student.adapter, seed=work.seed)
    if _recomputes(work) and model is not base:
        base.enable_input_require_grads()  # frozen embeddings would leave nothing to recompute for
    if work.stage.trainer.torch_compile:
        compile_layers(base)
    trainer = work.stage.trainer
    operator = operator_for(trainer.operator, args.device.type)
    shares = {layer.key: layer.share for layer in work.caches.layers}
    objective = Objective(head, chunk_bytes=trainer.operator_chunk_mib << 20, operator=operator, shares=shares)
    if work.hidden is not None:
        objective.layers = LayerLosses(base, work.stage.losses, work.hidden.identity, seed=work.seed)
    work.patch(base, objective)
    if shards:
        shard(model, base, args.device)
    return model, objective


def _longest_row(work: StageWork) -> int:
    """Return the tokens of the longest row that the student will see in training or in an evaluation."""
    longest = min(int(work.caches.num_tokens.max()), work.plan.limit)
    held = [row for rows in work.heldout.rows.values() for row in rows] if work.heldout is not None else []
    return max([longest, *(int(work.caches.num_tokens[row]) for row in held)])


def _check_rows_alone(work: StageWork, base: Any) -> None:
    """Refuse what needs all rows of a pack in one pass, of a student whose layers do not keep them apart.

    Raises:
        TrainingError: with the setting to change.
    """
    asked = "trainer.fsdp: full_shard" if work.stage.trainer.fsdp != "none" else "losses on a hidden layer"
    if work.stage.trainer.fsdp != "none" or work.hidden is not None:
        raise TrainingError(
            f"layers of {type(base).__name__} do not keep the rows of a pack apart, so each length of rows runs alone, "
            f"which {asked} does not allow; leave that out, or choose a student whose layers keep packed rows apart"
        )


def _evaluation(work: StageWork, base: Any, objective: Objective) -> EvaluationRun | None:
    """Return what evaluates the student while it trains, where the recipe wants it."""
    if work.stage.evaluate is None or work.heldout is None:
        return None
    pack_tokens, attention = work.stage.trainer.pack_tokens, work.student.attention
    return EvaluationRun(work.stage.evaluate, work.heldout, base, objective, pack_tokens, attention)


def _callbacks(work: StageWork, done: int) -> list[Any]:
    """Return the TensorBoard callback, writing below the stage's directory, where the recipe wants it."""
    if "tensorboard" not in work.stage.trainer.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [
        TensorBoardCallback(SummaryWriter(str(work.directory / "tensorboard"), purge_step=done + 1 if done else None))
    ]


def _write_health(work: StageWork, *, model_saved: bool, stopped: str | None) -> None:
    steps = read_steps(work.directory / "metrics.jsonl")
    verdict = _verdict(work, work.plan.num_steps)
    health = health_of(
        steps,
        steps[-1]["step"] if verdict.stops and steps else work.plan.num_steps,
        model_saved=model_saved,
        checkpoint_steps=[checkpoint.step for checkpoint in list_checkpoints(work.directory)],
        logging_steps=work.stage.trainer.logging_steps,
        stopped=stopped,
    )
    if work.stage.evaluate is not None:
        best = verdict.best_step
        health |= {
            "stopped_early_at": verdict.stopped_at,
            "best_step": best,
            "best_kl_nats": verdict.best_kl_nats,
            "model_is_of_step": best if work.stage.evaluate.keep_best and best else health["steps_done"],
        }
    write_atomic(work.directory / "health.json", json.dumps(health, indent=1).encode(), what="health")


@contextmanager
def _deterministic() -> Iterator[None]:
    """Choose deterministic kernels while a stage trains on a CPU, where they cost nothing; restore what was set
    before.
    """
    if torch.cuda.is_available():
        yield
        return
    before, filling = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling

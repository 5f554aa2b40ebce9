"""`decant plan --card 24GiB`: does each stage's training fit the card, with which micro-batch, checkpointing and chunk?
`--card 2x24GiB`: two such cards with a process each, which hold what `trainer.fsdp` says.

For each stage the settings that keep its arithmetic are searched, fastest first: activations kept before recomputed,
large forward passes before small ones (packs per forward pass times accumulation stays what the recipe says), a large
chunk of the loss before a small one. What fits is given as `--set` options; what cannot fit is refused with the
smallest change that would; shards over more cards are proposed where training accepts them. Bytes are those of one
process, from student_train/fit/memory.py.
Cost: building the student's shape without weights, then a few hundred multiplications per stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import DecantError, ModelError, TrainingError, UsageError, reason_of
from shared.identity.hidden_identity import HiddenIdentity
from shared.recipe.recipe import Recipe, Stage, StageTrainer, Student, rounding_problem
from shared.recipe.sections.optimizers import OPTIMIZERS
from shared.recipe.sections.training import recomputation

GIB = 2**30
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
CARDS_GIB = (12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Cards that are sold, for naming one that would do."""
CARD_COUNTS = (2, 4, 8, 16)
"""Cards over which shards are proposed."""
SMALLEST_CHUNK_MIB = 64
WORTHWHILE_TOKENS = 2048
"""Below so many tokens per forward pass a GPU starves, so activations are recomputed first."""
SHORTEST_PACK = 512


@dataclass(frozen=True, slots=True)
class Cards:
    """Cards of one size, with a process on each."""

    count: int
    card_bytes: int


def read_cards(text: str) -> Cards:
    """Return the cards that `24GiB` or `2x24GiB` names.

    Raises:
        UsageError: it is no size.

    >>> read_cards("24GiB"), read_cards("2x1.5 GB")
    (Cards(count=1, card_bytes=25769803776), Cards(count=2, card_bytes=1500000000))
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,4})\s*x\s*)?(\d{1,9}(?:\.\d{1,9})?)\s*(GiB|GB|MiB|MB)", text.strip(), re.ASCII)
    if not match or float(match[2]) <= 0:
        raise UsageError(f"--card {text} is no size; expected one such as 24GiB, or 2x24GiB for two cards")
    return Cards(int(match[1] or 1), int(float(match[2]) * UNITS[match[3]]))


@dataclass(frozen=True, slots=True)
class Case:
    """One stage's training, to be fitted."""

    shape: Any
    student: Student
    stage: Stage
    cards: Cards
    hidden: HiddenIdentity | None
    """The hidden layer that its losses read."""

    def estimate(self, trainer: StageTrainer, recomputes: bool | None = None) -> Any:
        """Return the bytes of a process that trains with these arguments."""
        from student_train.fit.memory import StepContext, estimate_memory

        context = StepContext(self.cards.count, self.stage.losses, self.hidden, self.stage.max_length)
        return estimate_memory(self.shape, self.student, trainer, context=context, recomputes=recomputes)

    def fits(self, estimate: Any) -> bool:
        """Return whether that is on a card."""
        return bool(estimate.total <= self.cards.card_bytes)

    def changed(self, student: dict[str, Any], trainer: dict[str, Any], **stage: Any) -> Case:
        """Return the case with other fields of the student, the stage's trainer and the stage."""
        update = {"trainer": self.stage.trainer.model_copy(update=trainer), **stage}
        return replace(
            self, student=self.student.model_copy(update=student), stage=self.stage.model_copy(update=update)
        )

    def check(self) -> None:
        """Refuse what training refuses of processes and shards.

        Raises:
            TrainingError: with the setting to change.
        """
        from student_train.layers.layer_losses import check_layer_losses
        from student_train.train.sharding import check_shardable

        check_shardable(self.student, self.stage.trainer, self.cards.count)
        check_layer_losses(self.stage, self.student)
        why = rounding_problem(self.student, self.stage.trainer)
        if why is not None:
            raise TrainingError(f"trainer.rounding: {why}")

    def is_accepted(self) -> bool:
        """Return whether training accepts it."""
        try:
            self.check()
        except TrainingError:
            return False
        return True


def plan_card(recipe: Recipe, cards: Cards) -> dict[str, Any]:
    """Return settings and bytes of every stage's training on cards with a process each.

    Raises:
        TrainingError: the recipe trains nothing, the student's sizes or those of a hidden layer are unknown, or a stage
            cannot be trained so or cannot fit.
    """
    from student_train.fit.model_shape import shape_of
    from tools.plan.plan_hidden import hidden_layer_to_train

    if recipe.student is None or not recipe.stages:
        raise TrainingError(
            "the recipe has no student with stages to train, so nothing is to fit on a card; leave --card out"
        )
    configs: dict[str, tuple[Any, str | None]] = {}
    stages: dict[str, Any] = {}
    for stage in recipe.stages:
        source = _source(recipe, stage)
        if source not in configs:
            config, note = student_config(recipe, source)
            configs[source] = (shape_of(config, trust_remote_code=recipe.student.trust_remote_code), note)
        shape, note = configs[source]
        case = Case(shape, recipe.student, stage, cards, hidden_layer_to_train(recipe, stage))
        try:
            case.check()
        except TrainingError as error:
            alone = stage.trainer.fsdp != "none" and cards.count == 1
            said = "; plan several cards with --card 2x24GiB" if alone else ""
            raise TrainingError(f"stage '{stage.name}': {error}{said}") from None
        stages[stage.name] = {"parameters": shape.num_parameters, "note": note, **_stage(case)}
    return {"cards": cards.count, "card_bytes": cards.card_bytes, "stages": stages}


def _source(recipe: Recipe, stage: Stage) -> str:
    """Return the model whose sizes a stage has: the directory that it starts from, or the student."""
    assert recipe.student is not None
    start = stage.init_from
    known = {"base", "previous", *(other.name for other in recipe.stages)}
    return start if start not in known and (Path(start) / "config.json").is_file() else recipe.student.model


def student_config(recipe: Recipe, source: str) -> tuple[Any, str | None]:
    """Return a student's transformers config, and a sentence where the recipe stated it.

    Raises:
        TrainingError: it can be had neither from the model nor from the recipe.
    """
    from transformers import AutoConfig

    from shared.models.files import load_config

    assert recipe.student is not None
    student, stated = recipe.student, recipe.assume.student
    try:
        revision = student.revision if source == student.model else None
        trust = student.trust_remote_code
        return load_config(source, what="the student", revision=revision, trust_remote_code=trust), None
    except ModelError as error:
        if stated is None:
            raise ModelError(f"{error}; or state its config in assume.student.config of the recipe") from None
    values = dict(stated.config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values), "sizes are those that assume.student states"
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"assume.student.config is no config of transformers: {reason_of(error, 200)}; copy the model's config.json"
        ) from None


def _stage(case: Case) -> dict[str, Any]:
    """Return what fits, or raise with the smallest change that would."""
    from student_train.fit.precision import precision_notes

    student, stage = case.student, case.stage
    as_written = case.estimate(stage.trainer)
    chosen = _first_fit(case)
    if chosen is None:
        raise _refusal(case)
    trainer, recomputes, estimate = chosen
    settings = {
        "pack_tokens": trainer.pack_tokens,
        "per_device_train_batch_size": trainer.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "gradient_checkpointing": recomputes,
        "operator_chunk_mib": trainer.operator_chunk_mib,
    }
    wrote = {name: getattr(stage.trainer, name) for name in settings}
    wrote["gradient_checkpointing"] = recomputation(student, stage.trainer) is True
    return {
        "as_written_bytes": as_written.total,
        "as_written_fits": case.fits(as_written),
        "settings": settings,
        "set": _options(stage, {name: value for name, value in settings.items() if value != wrote[name]}),
        "fsdp": trainer.fsdp,
        "precision": [
            *precision_notes(stage, student, on_gpu=True),
            *_kept_updates(case, trainer, recomputes),
        ],
        "tokens_per_forward": trainer.pack_tokens * trainer.per_device_train_batch_size,
        "moment": estimate.moment,
        "terms": estimate.terms(),
        "allocated_bytes": estimate.allocated,
        "total_bytes": estimate.total,
    }


def _options(stage: Stage, values: Mapping[str, Any]) -> list[str]:
    """Return fields of a stage's trainer as `--set` takes them."""
    return [f"stages.{stage.name}.trainer.{name}={str(value).lower()}" for name, value in values.items()]


def _kept_updates(case: Case, chosen: StageTrainer, recomputes: bool) -> Iterator[str]:
    """Yield how a stage that rounds updates away keeps them on this card: masters where there is room, else chance."""
    from student_train.fit.precision import loses_updates

    student, stage = case.student, case.stage
    if not loses_updates(stage, student):
        return
    optim = stage.trainer.optim if "8bit" in stage.trainer.optim else "adamw_8bit"
    ways: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("masters in float32 with 8-bit states", {"dtype": "float32"}, {"bf16": True, "optim": optim})
    ]
    if student.dtype == "bfloat16" and OPTIMIZERS[stage.trainer.optim].steps_weight_by_weight:
        ways.append(("rounding by chance", {}, {"rounding": "stochastic"}))
    for words, of_student, of_trainer in ways:
        changed = case.changed(of_student, of_trainer)
        estimate = changed.estimate(chosen.model_copy(update=of_trainer), recomputes)
        if changed.fits(estimate) and changed.is_accepted():
            options = [f"student.{name}={value}" for name, value in of_student.items()]
            said = " ".join(f"--set {option}" for option in [*options, *_options(stage, of_trainer)])
            yield f"{words} fit this card ({estimate.total / GIB:.1f} GiB): {said}"
            return


def _first_fit(case: Case) -> tuple[StageTrainer, bool, Any] | None:
    """Return the fastest settings that fit: arguments, whether activations are recomputed, bytes."""
    for trainer, recomputes in _candidates(case.student, case.stage):
        estimate = case.estimate(trainer, recomputes)
        if case.fits(estimate):
            return trainer, recomputes, estimate
    return None


def _candidates(student: Student, stage: Stage) -> Iterator[tuple[StageTrainer, bool]]:
    """Yield settings with the same tokens per optimizer step, fastest first."""
    trainer = stage.trainer
    packs = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    must = recomputation(student, trainer) is True
    for recomputes in (True,) if must else (False, True):
        for pack_tokens in _pack_lengths(stage):
            num_packs = packs * trainer.pack_tokens // pack_tokens
            for batch in (size for size in range(num_packs, 0, -1) if num_packs % size == 0):
                is_starved = batch * pack_tokens < min(WORTHWHILE_TOKENS, num_packs * pack_tokens)
                if is_starved and not recomputes:
                    continue
                shares = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": num_packs // batch}
                chunk = trainer.operator_chunk_mib
                while True:
                    update = {"pack_tokens": pack_tokens, "operator_chunk_mib": chunk, **shares}
                    yield trainer.model_copy(update=update), recomputes
                    if chunk // 2 < SMALLEST_CHUNK_MIB:
                        break
                    chunk //= 2


def _pack_lengths(stage: Stage) -> Iterator[int]:
    """Yield lengths of a pack that cut no further row: halves, down to the longest row that the recipe allows."""
    length = stage.trainer.pack_tokens
    yield length
    while stage.max_length is not None and length % 2 == 0 and length // 2 >= max(stage.max_length, SHORTEST_PACK):
        length //= 2
        yield length


def _refusal(case: Case) -> DecantError:
    """Return the sentence for a stage that cannot fit, with the smallest change that would."""
    estimates = (case.estimate(*candidate) for candidate in _candidates(case.student, case.stage))
    least = min(estimates, key=lambda estimate: estimate.total)
    largest = ", ".join(f"{name} {value / GIB:.1f}" for name, value in list(least.terms().items())[:3])
    each = f"each of {case.cards.count} cards" if case.cards.count > 1 else "the card"
    wanted = (
        f"stage '{case.stage.name}' of a student of {case.shape.num_parameters / 1e9:.2f} billion parameters needs at "
        f"least {least.total / GIB:.1f} GiB ({largest}) where {each} has {case.cards.card_bytes / GIB:.1f} GiB"
    )
    return TrainingError(f"{wanted}; {_smallest_change(case, least.total)}")


def _smallest_change(case: Case, least_bytes: int) -> str:
    """Return what to change, the least first: shorter packs, shards over the same cards, the optimizer's state, the
    weights' type, an adapter, the card or more of them.
    """
    changes = list(_changes(case.student, case.stage))
    if case.cards.count > 1 and case.stage.trainer.fsdp == "none":
        changes.insert(0, ("set fsdp: full_shard", {}, {"fsdp": "full_shard"}))
    for words, changed_student, changed_trainer in changes:
        if gib := _fitting_gib(case.changed(changed_student, changed_trainer, max_length=None)):
            return f"{words} ({gib:.1f} GiB)"
    enough = next((size for size in CARDS_GIB if size * GIB >= least_bytes), None)
    larger = f"use a card of {enough} GiB" if enough else "choose a smaller student"
    shared = _more_cards(case)
    return f"{larger}, or {shared}" if shared else larger


def _more_cards(case: Case) -> str | None:
    """Return how many more cards of the same size hold it in shards; None where none do, or training refuses."""
    for count in (number for number in CARD_COUNTS if number > case.cards.count):
        sharded = replace(case.changed({}, {"fsdp": "full_shard"}), cards=replace(case.cards, count=count))
        if gib := _fitting_gib(sharded):
            return f"train with fsdp: full_shard on {count} such cards ({gib:.1f} GiB on each)"
    return None


def _fitting_gib(case: Case) -> float | None:
    """Return the GiB of a case's fastest settings that fit; None where none do, or training refuses it."""
    fit = _first_fit(case) if case.is_accepted() else None
    return None if fit is None else float(fit[2].total / GIB)


def _changes(student: Student, stage: Stage) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield changes in words, as fields of the student and of the trainer, alone and then with shorter packs."""
    narrow = {"dtype": "bfloat16"}
    ways: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("", {}, {})]
    if student.adapter.trains_all_weights:
        lora, qlora = (student.adapter.model_copy(update={"kind": kind}) for kind in ("lora", "qlora"))
        if "8bit" not in stage.trainer.optim:
            ways.append(("set optim: adamw_8bit", {}, {"optim": "adamw_8bit"}))
        if student.dtype == "float32":
            ways.append(("set student.dtype: bfloat16 and optim: adamw_8bit", narrow, {"optim": "adamw_8bit"}))
        ways.append(("use adapter: lora with dtype: bfloat16", {"adapter": lora, **narrow}, {}))
        ways.append(("use adapter: qlora with dtype: bfloat16", {"adapter": qlora, **narrow}, {}))
    else:
        if student.dtype == "float32":
            ways.append(("set student.dtype: bfloat16", narrow, {}))
        if not student.adapter.holds_4_bits:
            qlora = student.adapter.model_copy(update={"kind": "qlora"})
            ways.append(("use adapter: qlora with dtype: bfloat16", {"adapter": qlora, **narrow}, {}))
    pack = stage.trainer.pack_tokens
    shorter = [
        pack >> halving for halving in range(1, 12) if pack % (1 << halving) == 0 and pack >> halving >= SHORTEST_PACK
    ]
    for words, changed_student, changed_trainer in ways:
        if words:
            yield words, changed_student, changed_trainer
        for length in shorter[:2] if words == "" else shorter:
            also = f"{words} and pack_tokens: {length}" if words else f"set pack_tokens: {length}"
            accumulation = stage.trainer.gradient_accumulation_steps * (pack // length)
            update = {"pack_tokens": length, "gradient_accumulation_steps": accumulation}
            yield also, changed_student, {**changed_trainer, **update}


COLUMNS = ("weights", "gradients", "optimizer", "activations", "chunk", "head", "workspace")


def card_text(result: dict[str, Any]) -> str:
    """Lay it out for people, in GiB."""
    width = max(len("stage"), *(len(name) for name in result["stages"]))
    heads = ["stage".ljust(width), *(name.rjust(11) for name in COLUMNS), "total".rjust(7)]
    lines = [
        f"on {_cards_text(result)}, in GiB at the moment of most memory:",
        "  " + " ".join(heads),
    ]
    notes: list[str] = []
    for name, stage in result["stages"].items():
        cells = [f"{stage['terms'][column] / GIB:11.2f}" for column in COLUMNS]
        lines.append("  " + " ".join([name.ljust(width), *cells, f"{stage['total_bytes'] / GIB:7.2f}"]))
        chosen = stage["settings"]
        how = (
            f"{stage['tokens_per_forward']:,} tokens per forward pass, activations "
            f"{'recomputed' if chosen['gradient_checkpointing'] else 'kept'}, chunk {chosen['operator_chunk_mib']} "
            f"MiB; most at {stage['moment']}"
        )
        notes.append(f"  {name}: {stage['parameters'] / 1e9:.2f} billion parameters, {how}")
        written = f"{stage['as_written_bytes'] / GIB:.1f} GiB as written"
        if stage["set"]:
            options = " ".join(f"--set {option}" for option in stage["set"])
            fits = f"fits too; the fastest that fits, shown here: {options}"
            notes.append(f"    {written}, which {fits if stage['as_written_fits'] else f'does not fit; use {options}'}")
        notes += [f"    {said}" for said in stage["precision"]]
        if stage["note"]:
            notes.append(f"    {stage['note']}")
    lines += notes
    lines.append(f"  assumed: {_assumed(result)}; bytes by arithmetic, checked against a small model on a CPU")
    return "\n".join(lines)


def _cards_text(result: dict[str, Any]) -> str:
    size = f"{result['card_bytes'] / GIB:.1f} GiB"
    return f"a card of {size}" if result["cards"] == 1 else f"each of {result['cards']} cards of {size}"


def _assumed(result: dict[str, Any]) -> str:
    """Say what each card was taken to hold."""
    count = result["cards"]
    if count == 1:
        return "one device holds all weights"
    sharded = [name for name, stage in result["stages"].items() if stage["fsdp"] != "none"]
    whole = [name for name in result["stages"] if name not in sharded]
    said = [f"shards over {count} processes ({', '.join(sharded)})"] if sharded else []
    if whole:
        said.append(f"everything on each of {count} cards, gradients twice ({', '.join(whole)})")
    return f"one process per card: {', '.join(said)}; what NCCL itself takes is not counted"

"""What a recipe may say about phase 2: student, stages, losses, and the arguments of transformers.Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from shared.recipe.base import (
    Count,
    CountOrZero,
    Fraction,
    HomePath,
    Kind,
    Name,
    NonNegative,
    Number,
    Positive,
    Problem,
    Section,
    Seed,
    Text,
    closest,
    one_or_many,
    quoted,
    repeated,
    unused,
)
from shared.recipe.schedule import Schedule
from shared.recipe.sections.curriculum import Balance, Sampling, StageEvaluation
from shared.recipe.sections.losses import LOSSES_ON_HIDDEN_LAYER, Loss
from shared.recipe.sections.optimizers import ADAM, OPTIMIZERS
from shared.recipe.sections.rounds import Rounds
from shared.recipe.sections.target_layers import TargetLayer, target_problems

RESERVED_STAGE_NAMES = ("base", "teacher", "previous")
"""Names with a meaning of their own."""


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        names, near = list(OPTIMIZERS), closest(name, list(OPTIMIZERS))
        raise PydanticCustomError(
            "unknown_optimizer",
            "{text}",
            {"text": f"'{name}' is no optimizer that a stage can use{near or f'; choose one of {quoted(names)}'}"},
        )
    return name


OptimizerName = Annotated[str, AfterValidator(_known_optimizer), WithJsonSchema({"enum": sorted(OPTIMIZERS)})]

Reporter = Literal["tensorboard", "wandb", "none"]


class Adapter(Kind):
    """How the student's weights are trained: all of them, or low-rank additions."""

    kind: Literal["none", "lora", "qlora"] = "none"
    """none: all weights; lora: low-rank additions; qlora: the same over 4-bit weights."""
    r: Count = 16
    """Rank."""
    alpha: Positive = 32
    """Scale of the additions, divided by the rank."""
    dropout: Annotated[Fraction, Field(lt=1)] = 0.0
    """Dropout before the additions."""
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """Which layers get additions: all-linear (without the head), a pattern, or names."""

    @property
    def trains_all_weights(self) -> bool:
        """Whether the student's own weights learn, not additions to them."""
        return self.kind == "none"

    @property
    def holds_4_bits(self) -> bool:
        """Whether the weights below the additions are kept in 4 bits."""
        return self.kind == "qlora"

    def _problems(self) -> list[Problem]:
        options = type(self).model_fields if self.trains_all_weights else ()
        return unused(self, options, "kind 'none' adds nothing to the weights; write lora or qlora")


class Student(Section):
    """The model that learns."""

    model: HomePath
    """A directory or a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from its weights, or from fresh ones of its config."""
    revision: Text | None = None
    """Revision of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the weights are kept; float32 masters keep small updates."""
    adapter: Adapter = Adapter()
    """none, lora or qlora, or a section with options."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; packs stay separate in sdpa and flash_attention_2."""
    trust_remote_code: bool = False
    """Run Python that comes with the model."""
    gradient_checkpointing: Literal["auto"] | bool = False
    """Recompute activations in the backward pass: less memory, a third more time; auto: where a first, measured step
    would not fit the GPU otherwise."""
    liger: bool = False
    """Use liger-kernel's norms, MLP and rotary embeddings; needs an NVIDIA GPU. Its losses stay off: the loss is
    Decant's own.
    """


_TELL_TERMS_APART = {"temperature", "beta", "skew"}
"""Options that make two entries of one divergence two terms."""


class StageTrainer(Section):
    """Arguments of one stage's training, in the spelling of transformers.TrainingArguments."""

    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    max_steps: Count | None = None
    """Optimizer steps; left out: num_train_epochs decides."""
    num_train_epochs: Positive = 1.0
    """Passes over the rows, where max_steps is left out."""
    pack_tokens: Count = 2048
    """Tokens in one pack; rows are packed without attention between them."""
    per_device_train_batch_size: Count = 1
    """Packs per device and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """How the learning rate moves."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the schedule, such as min_lr."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises."""
    warmup_ratio: Annotated[Fraction, Field(lt=1)] = 0.0
    """The same as a share of all steps."""
    weight_decay: NonNegative = 0.0
    """Weight decay, apart from the gradient; adagrad and the kinds of rmsprop add it to the gradient."""
    adam_beta1: Annotated[Fraction, Field(lt=1)] = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Annotated[Fraction, Field(lt=1)] = 0.999
    """Decay of the mean of squared gradients."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the latter."""
    max_grad_norm: NonNegative = 1.0
    """Clip gradients to this norm; 0 does not clip."""
    max_grad_norm_factor: Annotated[Number, Field(gt=1)] | None = 100.0
    """Stop when the gradient's norm before clipping exceeds its running median by this factor in 5 steps in a row;
    null: never.
    """
    optim: OptimizerName = "adamw_torch"
    """Optimizer, by its name in transformers."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updates of weights kept in bfloat16 are rounded: to the nearest number, which loses those below half of a
    weight's last bit, or up and down by chance, exact on average.
    """
    bf16: bool = False
    """Compute in bfloat16 over float32 weights."""
    fp16: bool = False
    """Compute in float16 over float32 weights, with loss scaling."""
    tf32: bool | None = None
    """Allow TF32 matrix products; left out: torch's default."""
    torch_compile: bool = False
    """Compile the model's body."""
    gradient_checkpointing: Literal["auto"] | bool | None = None
    """Recompute activations in the backward pass of this stage; left out: as the student's section says."""
    fsdp: Literal["none", "full_shard"] = "none"
    """What several processes hold: none: each the whole student; full_shard: a part of its weights and optimizer state
    each.
    """
    operator: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the fused loss; auto: on a GPU whichever is faster on the first pack, elsewhere torch."""
    operator_chunk_mib: Annotated[Count, Field(le=16384)] = 256
    """MiB of the fused loss's buffers: smaller ones save memory, larger ones hardly time."""
    save_steps: Count = 100
    """Steps between checkpoints."""
    save_total_limit: Count | None = 2
    """Checkpoints to keep."""
    logging_steps: Count = 1
    """Steps between lines in metrics.jsonl."""
    dataloader_num_workers: CountOrZero = 0
    """Processes that read the cache."""
    report_to: Annotated[
        tuple[Reporter, ...], BeforeValidator(one_or_many, json_schema_input_type=Reporter | tuple[Reporter, ...])
    ] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""
    seed: Seed | None = None
    """Seed of order, dropout and fresh weights; left out: the recipe's."""

    def _problems(self) -> Iterator[Problem]:
        if self.bf16 and self.fp16:
            yield ("fp16",), "bf16 and fp16 are both on; keep one"
        if self.warmup_steps and self.warmup_ratio:
            yield ("warmup_ratio",), "warmup_steps and warmup_ratio are both set; keep one"
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            said = "'constant' begins at its full rate, without warmup; write constant_with_warmup"
            yield ("lr_scheduler_type",), said
        foreign = set(ADAM) - set(OPTIMIZERS[self.optim].reads)
        yield from unused(self, foreign, f"the optimizer '{self.optim}' does not use it, so leave it out")
        if "none" in self.report_to and len(self.report_to) > 1:
            yield ("report_to",), "'none' stands alone"


class Stage(Section):
    """One training run: where it starts, what it minimises, on which rows, for how long."""

    name: Name
    """Directory of the stage below output_dir/train, and its name everywhere else."""
    init_from: HomePath = "base"
    """base (the student's own weights), previous, an earlier stage's name, a model directory (with a '/'), or another
    run's stage: its directory, or RUN_DIRECTORY:STAGE."""
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)]
    """Terms of the loss; they are added."""
    balance: Balance = Balance()
    """fixed, grad_norm or uncertainty, or a section with options: what moves the weights of the losses against each
    other.
    """
    mixture: dict[str, Schedule] | None = None
    """Share of each source in the training tokens, a number or a schedule; left out: as they are in the cache."""
    sampling: Sampling | None = None
    """Shares that follow the stage's evaluations, beginning with the mixture; left out: the mixture alone decides."""
    targets: str | Annotated[tuple[TargetLayer, ...], Field(min_length=1)] | None = None
    """Targets layer of the cache, where it has more than one; or several teachers, each with weight and sources."""
    hidden: Text | None = None
    """Hidden layer of the cache, where it has more than one and losses read it."""
    max_length: Count | None = None
    """Longest row in tokens; left out: pack_tokens."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What happens to longer rows."""
    window_parts: Count | None = None
    """Rows are shuffled within windows of so many parts of the cache, as a stream needs it; left out: 8 where the cache
    is read from a URL, else all rows together."""
    evaluate: StageEvaluation | None = None
    """Held-out figures and sample answers while it trains; left out: none."""
    rounds: Rounds | None = None
    """Train in rounds on the student's own answers, scored by the teacher; left out: on the cache alone."""
    trainer: StageTrainer = StageTrainer()
    """Arguments of the training."""

    def _problems(self) -> Iterator[Problem]:
        if self.name in RESERVED_STAGE_NAMES:
            yield ("name",), f"'{self.name}' is reserved; call the stage something else"
        if all(max(loss.weight.extremes()) == 0 for loss in self.losses):
            yield ("losses",), "every weight is 0, so there is nothing to minimise"
        apart = [set() if loss.learns_from == "hidden" else _TELL_TERMS_APART for loss in self.losses]
        for i in repeated(
            loss.model_dump_json(include={"name", *names}) for loss, names in zip(self.losses, apart, strict=True)
        ):
            said = f"'{self.losses[i].name}' is listed twice; add up its weights in one entry"
            yield ("losses", i, "name"), said
        if self.hidden is not None and not any(loss.learns_from == "hidden" for loss in self.losses):
            listed = ", ".join(LOSSES_ON_HIDDEN_LAYER)
            yield ("hidden",), f"no loss of the stage reads a hidden layer ({listed} do), so leave it out"
        num_teachers = len(self.targets) if isinstance(self.targets, tuple) else 1
        if self.balance.kind != "fixed" and len(self.losses) < 2 and num_teachers < 2:
            yield ("balance",), "there is one loss, and nothing to balance it against; leave it out"
        if self.mixture is not None and not self.mixture:
            yield ("mixture",), "names no source; leave it out to take the rows as they are"
        yield from self._mixture_problems()
        yield from self._teacher_problems()
        if self.rounds is not None:
            yield from self._rounds_problems()
        pack = self.trainer.pack_tokens
        if self.max_length is not None and self.max_length > pack:
            said = f"a row of {self.max_length} tokens does not fit a pack of {pack}; raise trainer.pack_tokens"
            yield ("max_length",), said

    @property
    def needs_teacher(self) -> bool:
        """Return whether any of its losses looks at the teacher's targets."""
        return any(loss.learns_from == "targets" for loss in self.losses)

    @property
    def goes_over_run(self) -> bool:
        """Return whether one of its schedules goes over all stages."""
        moving = [schedule for loss in self.losses for schedule in (loss.weight, loss.temperature)]
        moving += [entry.weight for entry in self.targets] if isinstance(self.targets, tuple) else []
        return any(schedule.over == "run" for schedule in (*moving, *(self.mixture or {}).values()))

    def _rounds_problems(self) -> Iterator[Problem]:
        if self.trainer.max_steps is None:
            yield ("trainer", "max_steps"), "a stage with rounds needs it: the optimizer steps of each round"
        if self.sampling is not None:
            yield ("sampling",), "shares of a stage with rounds are those of `rounds.own_share`; leave it out"
        if self.goes_over_run:
            yield ("rounds",), "a schedule that goes over the run cannot see the rounds; let it go over the stage"
        for name, share in (self.mixture or {}).items():
            if share.kind != "constant":
                why = "rounds divide what is not the student's own by numbers; give one, not a schedule"
                yield ("mixture", name), why
        if self.targets is not None:
            why = (
                "a stage with rounds learns from the layer that `teacher` and `capture` mean, which own answers get too"
            )
            yield ("targets",), f"{why}; leave it out, and let these two mean the layer that you want"
        for i, loss in enumerate(self.losses):
            if loss.learns_from == "hidden":
                why = f"own answers have no hidden layer, which '{loss.name}' reads; leave it out"
                yield ("losses", i, "name"), why
        if all(loss.learns_from == "text" for loss in self.losses):
            yield ("rounds",), "no loss of the stage asks the teacher about the student's answers; add forward_kl"

    def _teacher_problems(self) -> Iterable[Problem]:
        if not isinstance(self.targets, tuple):
            return []
        if not self.needs_teacher:
            return [(("targets",), "no loss of the stage is a divergence from a teacher, so name one layer at most")]
        return target_problems(self.targets)

    def _mixture_problems(self) -> Iterator[Problem]:
        mixture = self.mixture or {}
        for name, share in mixture.items():
            if max(share.extremes()) == 0:
                yield ("mixture", name), "this share is always 0; leave the source out"
        if self.sampling is None:
            return
        if self.evaluate is None:
            yield ("sampling",), "shares follow the stage's evaluations and it has none; add an `evaluate` section"
        elif self.sampling.every_steps is not None and self.sampling.every_steps % self.evaluate.every_steps:
            every = self.evaluate.every_steps
            yield ("sampling", "every_steps"), f"must be a multiple of evaluate.every_steps, which is {every}"
        for name, share in mixture.items():
            if share.kind != "constant":
                why = "sampling moves the shares itself; give a number to begin with, or leave `sampling` out"
                yield ("mixture", name), why
        if mixture and not len(mixture) * self.sampling.floor <= 1 <= len(mixture) * self.sampling.ceiling:
            yield ("sampling",), f"{len(mixture)} shares within floor and ceiling cannot sum to 1; move one of them"
        if self.trainer.dataloader_num_workers:
            said = "packs are planned while the stage trains, which other processes would not see; set it to 0"
            yield ("trainer", "dataloader_num_workers"), said


def recomputation(student: Student, trainer: StageTrainer) -> Literal["auto"] | bool:
    """Return whether a stage recomputes activations: what the stage says, or else what the student's section says."""
    return student.gradient_checkpointing if trainer.gradient_checkpointing is None else trainer.gradient_checkpointing

"""What a stage needs on a training card, by arithmetic: bytes of each term at the moment when the sum of all is
largest.

A step has four such moments: the end of the forward pass, where the loss makes its gradients; the beginning of the
backward pass, where every kept activation is still there; its end, where every gradient is; and the optimizer's update.
They are not added up:
they never meet. Counted at each: weights (and what autocast casts of them), gradients, optimizer state, activations
(kept, or recomputed layer by layer), the loss operator's chunk, and the head's copy and gradient. Logits are not
counted, never held. Bytes of a layer are sums over what torch keeps for one Qwen3 layer, counted storage by storage
while it ran; other families with the same parts differ by a few percent. Of several processes each is counted alone
(spread.py), what losses on a hidden layer add in hidden_memory.py.
Cost: a few multiplications; the model's shape is read from its config, without weights (model_shape.py).

Shape letters: H hidden width, I width of the MLP, B tokens of a forward pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.identity.hidden_identity import HiddenIdentity
from shared.recipe.recipe import StageTrainer, Student
from shared.recipe.sections.losses import Loss
from shared.recipe.sections.optimizers import OPTIMIZERS
from shared.recipe.sections.training import recomputation
from student_train.fit.hidden_memory import HiddenMemory, hidden_memory
from student_train.fit.model_shape import ModelShape
from student_train.fit.spread import Spread
from student_train.layers.student_attention import SCORES_AT_ONCE

GIB, MIB = 2**30, 2**20
CONTEXT_BYTES = 768 * MIB
"""What a CUDA process takes before it allocates: context, libraries, their workspaces."""
FRAGMENTATION = 0.08
"""Share of the allocated bytes that the allocator holds beyond them."""
BYTES_PER_4BIT_WEIGHT = 0.516
"""Half a byte, a byte of scale per 64 weights, and four bytes per 256 scales."""
SUPPORT_BYTES = 64 * 12
"""Targets of a position on the card: 64 entries of an id and a number."""

BYTES_PER_SCORE = 16
"""Of attention that is computed in blocks: scores, what a cap makes of them, their softmax and its gradient."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class _LayerBytes:
    """Bytes per token that a layer keeps, and that it has alive in its backward pass, per unit of (H, I, queries,
    keys).
    """

    kept: tuple[float, float, float, float]
    working: tuple[float, float, float, float]
    outside: float
    """Bytes per token and unit of H of the last norm, the loss's input and its gradient."""


_LAYERS = {
    ("wide", "narrow", "full"): _LayerBytes((26.0, 8.0, 12.1, 10.1), (26.5, 12.2, 12.5, 10.3), 12),
    ("wide", "wide", "full"): _LayerBytes((24.0, 16.0, 20.1, 16.1), (21.5, 24.8, 21.4, 16.7), 16),
    ("narrow", "narrow", "full"): _LayerBytes((16.0, 8.0, 12.1, 10.1), (22.9, 11.5, 11.3, 9.6), 10),
    ("wide", "narrow", "lora"): _LayerBytes((18.5, 8.2, 10.5, 8.3), (30.6, 14.5, 11.7, 8.6), 8),
    ("wide", "wide", "lora"): _LayerBytes((17.0, 16.5, 16.9, 12.4), (18.9, 24.7, 18.0, 12.7), 12),
    ("narrow", "narrow", "lora"): _LayerBytes((28.9, 10.5, 12.9, 8.4), (41.8, 14.5, 13.0, 8.5), 8),
    ("narrow", "autocast", "lora"): _LayerBytes((18.5, 8.2, 10.5, 8.3), (29.1, 14.4, 10.8, 8.4), 8),
}
"""By width of weights, width of products, and whether weights or additions to them are trained. Additions are float32;
over narrow weights without autocast each keeps a float32 copy of its input."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the card when they are most."""

    moment: str
    """Part of the training step where that is."""
    weights: int
    """With the narrow copies that autocast keeps."""
    gradients: int
    optimizer: int
    activations: int
    chunk: int
    """Buffers of the loss operator."""
    head: int
    """The operator's copy of the head and the gradients that it makes."""
    workspace: int
    """What the process takes besides tensors."""

    @property
    def allocated(self) -> int:
        """Bytes of tensors: what torch.cuda.max_memory_allocated counts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.chunk + self.head

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.allocated + self.workspace

    def terms(self) -> dict[str, int]:
        """Return bytes by term, largest first."""
        names = ("weights", "gradients", "optimizer", "activations", "chunk", "head", "workspace")
        return dict(sorted(((name, getattr(self, name)) for name in names), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class StepContext:
    """What of a stage's training is neither in its trainer's section nor in the student's."""

    num_processes: int = 1
    """One on each card; what each holds, `trainer.fsdp` says."""
    losses: Sequence[Loss] = ()
    """The stage's; those on a hidden layer count."""
    hidden: HiddenIdentity | None = None
    """The hidden layer that they read."""
    max_length: int | None = None
    """Tokens of a row at most; None: of a pack."""


ALONE = StepContext()
"""One process, losses of the head."""


def estimate_memory(
    shape: ModelShape,
    student: Student,
    trainer: StageTrainer,
    *,
    context: StepContext = ALONE,
    recomputes: bool | None = None,
    has_wide_products: bool = True,
) -> MemoryEstimate:
    """Return what a training step of a student of a shape needs on the card of one process.

    Args:
        shape: of the student.
        student: its section of the recipe.
        trainer: the stage's arguments.
        context: how many processes train, and losses on a hidden layer.
        recomputes: activations are recomputed; None: where the recipe says `true`.
        has_wide_products: the device multiplies bfloat16 into float32, so that the head needs no wider copy. GPUs do.

    Raises:
        TrainingError: a loss needs what the hidden layer does not keep, or what the student does not have.
    """
    if recomputes is None:
        recomputes = recomputation(student, trainer) is True
    return StepMemory(shape, student, trainer, context, recomputes, has_wide_products).estimate()


class StepMemory:
    """One training step's sizes."""

    def __init__(
        self,
        shape: ModelShape,
        student: Student,
        trainer: StageTrainer,
        context: StepContext,
        recomputes: bool,
        has_wide_products: bool = True,
    ) -> None:
        """Count for one process; arguments and errors as for `estimate_memory`."""
        self.shape, self.recomputes = shape, recomputes
        self.chunk = trainer.operator_chunk_mib * MIB
        self.num_packs = trainer.per_device_train_batch_size
        self.num_tokens = self.num_packs * trainer.pack_tokens
        self.holds_4_bits = student.adapter.holds_4_bits
        self.width = _WIDTH[student.dtype]
        self.autocast = trainer.bf16 or trainer.fp16
        self.is_full = student.adapter.trains_all_weights
        self.trained = shape.num_parameters if self.is_full else student.adapter.r * shape.lora_size
        self.trained_width = self.width if self.is_full else 4
        self.hidden = self._hidden(context)
        self.longest_row = min(trainer.pack_tokens, context.max_length or trainer.pack_tokens)
        projections = 0 if self.hidden is None else self.hidden.projections
        self.projections = projections * 4
        self.batch_bytes = SUPPORT_BYTES + (0 if self.hidden is None else self.hidden.batch)
        self.gradients = self.trained * self.trained_width + self.projections
        self.num_batches = trainer.gradient_accumulation_steps  # the trainer fetches all of a step's at once
        self.carried = self.gradients if self.num_batches > 1 else 0
        self.spread = Spread(
            context.num_processes,
            trainer.fsdp == "full_shard",
            shape.num_layers,
            self.weights(),
            shape.num_embedding_parameters * self.width,
            self.gradients,
            shape.num_embedding_parameters * self.width if self.is_full else 0,
        )
        self._set_optimizer(trainer, projections)
        narrow_hidden = trainer.bf16 or (student.dtype == "bfloat16" and not trainer.fp16)
        self.head_width = 2 if narrow_hidden and has_wide_products else 4
        self.has_wide_temporary = narrow_hidden and has_wide_products
        self.layer = _LAYERS[self._layer_key()]
        self.eager_bytes = 3 * (2 if self.width == 2 or self.autocast else 4) if student.attention == "eager" else 0
        is_wide = self.width == 4 and not self.autocast and student.attention == "sdpa"
        self.repeated_width = 4 if is_wide else 0

    def _set_optimizer(self, trainer: StageTrainer, projections: int) -> None:
        """Set bytes of the optimizer's state and of what an update works with."""
        optimizer, shape = OPTIMIZERS[trainer.optim], self.shape
        wide = shape.num_head_parameters if self.is_full and optimizer.wide_embeddings else 0
        rounds = trainer.rounding == "stochastic"
        number_bytes = 4 if rounds else self.trained_width
        state = (self.trained - wide) * optimizer.state_bytes(number_bytes) + wide * 4 * optimizer.states
        state += projections * optimizer.state_bytes(4)
        self.optimizer = 0 if optimizer.is_paged else self.spread.share(int(state))
        self.update = 0 if optimizer.updates_in_place else self.spread.share(self.gradients)
        if rounds:  # one weight at a time: itself, its gradient and what the update works with, in float32
            largest = max(shape.num_head_parameters, shape.largest_linear)
            self.update = largest * 4 * (2 if optimizer.updates_in_place else 3)

    def _hidden(self, context: StepContext) -> HiddenMemory | None:
        if context.hidden is None:
            return None
        narrow = 2 if self.width == 2 or self.autocast else 4
        return hidden_memory(
            context.losses, context.hidden, self.shape, residual_bytes=self.width, attention_bytes=narrow
        )

    def _layer_key(self) -> tuple[str, str, str]:
        kind = "full" if self.is_full else "lora"
        if self.width == 4:
            return ("wide", "narrow" if self.autocast else "wide", kind)
        return ("narrow", "autocast" if self.autocast and kind == "lora" else "narrow", kind)

    def _per_token(self, units: tuple[float, float, float, float]) -> float:
        shape = self.shape
        sizes = (shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_size)
        return sum(unit * size for unit, size in zip(units, sizes, strict=True))

    def weights(self) -> int:
        """Return bytes of the weights themselves."""
        shape, additions = self.shape, self.projections + (0 if self.is_full else self.trained * 4)
        if not self.holds_4_bits:
            return shape.num_parameters * self.width + additions
        plain = shape.num_parameters - shape.num_linear_parameters
        return int(plain * self.width + shape.num_linear_parameters * BYTES_PER_4BIT_WEIGHT) + additions

    def copies(self, *, in_forward: bool) -> int:
        """Return bytes of weights in the type of the products: autocast's, or a 4-bit layer unpacked."""
        if self.holds_4_bits:
            return self.shape.largest_linear * 2
        if self.width == 2 or not self.autocast:
            return 0
        all_kept = not self.recomputes or (in_forward and self.is_full)  # frozen weights are cast anew at every use
        return 2 * (self.shape.num_linear_parameters if all_kept else self.shape.largest_linear)

    def activations(self, moment: str) -> int:
        """Return bytes of what the backward pass finds again, and of what it works with."""
        shape, layers = self.shape, self.shape.num_layers
        squares = self.num_tokens * shape.num_heads * self.eager_bytes
        squares += self.repeated_width * 2 * (shape.query_size - shape.key_size)
        kept, working = self._per_token(self.layer.kept) + squares, self._per_token(self.layer.working) + squares
        residual, outside = shape.hidden_size * self.width, self.layer.outside * shape.hidden_size
        if moment == "forward":
            per_token = layers * (residual if self.recomputes else kept) + outside
        elif moment == "backward begins":
            per_token = layers * residual + working if self.recomputes else layers * kept + max(outside, working - kept)
        else:
            per_token = residual + max(working, kept)
        return int(self.num_tokens * (per_token + self.num_batches * self.batch_bytes)) + self._attention_bytes()

    def _hidden_losses(self) -> int:
        """Return bytes of what losses on a hidden layer keep and work with while they are computed; 0 without them."""
        hidden = self.hidden
        if hidden is None:
            return 0
        per_token = hidden.kept + hidden.working + (hidden.kept_recomputed if self.recomputes else 0)
        scores = min(SCORES_AT_ONCE, self.shape.num_heads * self.longest_row**2) if hidden.has_scores else 0
        return self.num_tokens * per_token + BYTES_PER_SCORE * scores

    def _hidden_gradients(self) -> int:
        return 0 if self.hidden is None else self.num_tokens * self.hidden.gradients

    def _attention_bytes(self) -> int:
        """Return bytes of masks, which all layers share, and of scores that attention has alive at once."""
        longest = self.num_tokens // self.num_packs
        if self.eager_bytes:
            return self.num_tokens**2
        windows = (
            longest**2 * (2 if self.width == 2 or self.autocast else 4)
            if self.shape.window is not None and self.shape.window < longest
            else 0
        )
        return windows + (BYTES_PER_SCORE * SCORES_AT_ONCE if self.shape.caps_scores else 0)

    def measured_bytes(self, passes: int) -> int:
        """Return the most bytes of tensors of a whole step, of which forward and backward pass alone, of a model that
        is whole and not yet given to several processes, were measured to need `passes`, with nothing else on the card
        than the weights.
        """
        update = self.weights() + self.gradients + self.optimizer + self.update
        waiting = self.num_tokens * (self.num_batches - 1) * self.batch_bytes
        return max(passes + self.optimizer + self.carried + waiting, update) + self.spread.buckets

    def estimate(self) -> MemoryEstimate:
        """Return the sizes at the moment when they are largest."""
        return max(self.moments(), key=lambda estimate: estimate.total)

    def moments(self) -> list[MemoryEstimate]:
        """Return the sizes at each moment where they may be largest."""
        shape, spread = self.shape, self.spread
        head = shape.num_head_parameters
        copy = 0 if self.width == self.head_width else head * self.head_width
        made = (head * 4 * (2 if self.has_wide_temporary else 1)) if self.is_full else 0
        handed = head * (4 if self.width == 4 else 4 + self.width) if self.is_full else 0
        narrow_chunk = self.chunk * 3 // 2 if self.has_wide_temporary else self.chunk
        embeddings = head * self.width if self.is_full else 0
        untied = 0 if shape.is_tied else embeddings
        of_ties = embeddings if shape.is_tied else 0
        forward, begins, ends = (self.activations(moment) for moment in ("forward", "backward begins", "backward ends"))
        carried = spread.share(self.carried) + spread.buckets
        reduced, root = spread.reduced(self.carried), spread.root_gradients
        begun = (carried if self.carried else carried + self.projections) + spread.layer_gradients
        in_loss = spread.weights_with(1) + self.copies(in_forward=True)
        in_backward = spread.weights_with(2) + self.copies(in_forward=False)
        last = "the end of the backward pass"
        found = [
            self._at("the loss", in_loss, carried, 0, forward, narrow_chunk, copy + made),
            self._at("the backward pass", in_backward, begun, 0, begins + self._hidden_gradients(), 0, handed),
            self._at(last, spread.weights_with(1), reduced + root - untied + 2 * spread.layer_gradients, 0, ends, 0, 0),
            self._at(last, spread.weights_with(0), reduced + root, 0, 0, 0, of_ties),
            self._at(
                "the optimizer's update",
                spread.weights_with(0, root=False),
                spread.share(self.gradients) + spread.buckets,
                self.update,
                0,
                0,
                0,
            ),
        ]
        if self.hidden is not None:
            active = forward + self._hidden_losses()
            found.append(self._at("the losses on a hidden layer", in_loss, begun, 0, active, 0, handed))
        if spread.is_sharded:
            reducing = reduced + 2 * root
            found.append(
                self._at("the root group's reduction", spread.weights_with(0, root=False), reducing, 0, 0, 0, 0)
            )
        return found

    def _at(
        self, moment: str, weights: int, gradients: int, update: int, activations: int, chunk: int, head: int
    ) -> MemoryEstimate:
        optimizer = self.optimizer + update
        allocated = weights + gradients + optimizer + activations + chunk + head
        workspace = CONTEXT_BYTES + int(FRAGMENTATION * allocated)
        return MemoryEstimate(moment, weights, gradients, optimizer, activations, chunk, head, workspace)

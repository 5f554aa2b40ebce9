"""The losses of a stage on the cache's hidden layer: which layers they pair, what they watch, and their values for a
batch.

Values are per supervised position of the global batch, as for the head's losses: `hidden` and `attention` are sums over
positions divided by that number, averaged over their pairs of layers. `contrastive` is the mean over the rows of a
forward pass, times the pass's share of the global batch's positions, so that passes add up to a mean; its negatives are
the rows of the same pass.
Cost: the projections, and what student_attention.py says.

Shape letters: B tokens of the packs, S supervised positions, R rows with a pooled state, H student width, D stored
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shared.errors import TrainingError
from shared.identity.hidden_identity import FINAL, HiddenIdentity
from shared.identity.hidden_layers import layer_name
from shared.recipe.recipe import Stage, Student
from shared.recipe.sections.losses import Loss
from student_train.batch.hidden_batch import teacher_masses, teacher_pooled, teacher_states
from student_train.layers.layer_map import LayerPair, pair_layers
from student_train.layers.projections import Projections
from student_train.layers.student_attention import stored_masses
from student_train.layers.student_watch import StudentWatch
from student_train.losses import LossTerm, representations
from student_train.losses.hidden_layers.representation import Reads

POOLED = "pooled"
"""Name of the projection of pooled states."""
_KEPT_BY: dict[Reads, str] = {
    "states": "add `layers` to capture.hidden",
    "attention": "add `attention` to capture.hidden",
    "pooled": "set capture.hidden.pooled to mean or last",
}
"""What a capture must say for a hidden layer to keep it."""


def check_layer_losses(stage: Stage, student: Student) -> None:
    """Refuse what losses on a hidden layer cannot be combined with, before anything is loaded.

    Raises:
        TrainingError: with the setting to change.
    """
    reads = {representations[loss.name].reads for loss in stage.losses if loss.name in representations}
    if reads and stage.trainer.fsdp != "none":
        raise TrainingError(
            "the losses hidden, attention and contrastive need the student whole, which trainer.fsdp: full_shard does "
            "not leave it; set it to none, or leave the losses out"
        )
    if reads & {"states", "attention"}:
        _check_layers_can_be_seen(stage, student, reads_attention="attention" in reads)


def _check_layers_can_be_seen(stage: Stage, student: Student, *, reads_attention: bool) -> None:
    """Refuse settings under which layers cannot be watched, or gradients not be measured below the last states."""
    measures = stage.balance.kind == "grad_norm"
    if measures and stage.trainer.fp16:
        raise TrainingError(
            "balance grad_norm measures gradients of the losses hidden and attention without a loss scale, so "
            "trainer.fp16 would turn small ones into 0; set trainer.bf16 instead, or balance to uncertainty"
        )
    if measures and student.liger:
        raise TrainingError(
            "balance grad_norm goes back through the layers several times with the losses hidden and attention, which "
            "the layers of student.liger do not allow, since they overwrite what they keep; leave liger out, or set "
            "balance to uncertainty"
        )
    if stage.trainer.torch_compile:
        raise TrainingError(
            "the losses 'hidden' and 'attention' watch layers while they run, which trainer.torch_compile does not "
            "allow; set it to false, or leave the losses out"
        )
    if reads_attention and student.attention == "eager":
        raise TrainingError(
            "the loss 'attention' cannot see through student.attention 'eager'; set it to sdpa or flash_attention_2"
        )


def pairs_of(
    losses: Sequence[Loss], identity: HiddenIdentity, num_student_layers: int
) -> dict[str, tuple[LayerPair, ...]]:
    """Return the pairs of layers that each loss on a hidden layer compares, by its name; none of pooled states.

    Raises:
        TrainingError: a loss needs what the layer does not keep, or what the student does not have.
    """
    found: dict[str, tuple[LayerPair, ...]] = {}
    stored = {"states": identity.layers, "attention": identity.attention_layers}
    for loss in losses:
        reads = representations[loss.name].reads if loss.name in representations else None
        if reads is not None and not (identity.pooled != "none" if reads == "pooled" else stored[reads]):
            raise TrainingError(
                f"the hidden layer keeps nothing that loss '{loss.name}' needs; {_KEPT_BY[reads]} and run "
                "'decant teach'"
            )
        if reads in stored:
            given = getattr(loss, "layer_map", None)
            found[loss.name] = pair_layers(loss.name, stored[reads], identity.num_layers, num_student_layers, given)
    return found


class LayerLosses:
    """Losses on one hidden layer, for one student."""

    def __init__(self, base: Any, losses: Sequence[Loss], identity: HiddenIdentity, *, seed: int) -> None:
        """Pair the layers, watch the student's and give it its projections.

        Args:
            base: the causal language model below any adapter.
            losses: the stage's; others than those on a hidden layer are left alone.
            identity: of the hidden layer.
            seed: of the projections.

        Raises:
            TrainingError: a loss needs what the layer does not keep, or what the student does not have.
        """
        self._identity = identity
        num_layers = base.config.get_text_config().num_hidden_layers
        by_name = {loss.name: loss for loss in losses if loss.name in representations}
        self._pairs = pairs_of(losses, identity, num_layers)
        states = [pair.student for pair in self._read("states") if pair.student != FINAL]
        attention = sorted({pair.student for pair in self._read("attention")})
        # queries and keys come from a layer's input
        lowest = min([*states, *(layer - 1 for layer in attention)], default=None)
        self._watch = StudentWatch(base, states, attention, lowest)
        names = [_projection_name(pair) for pair in self._read("states")]
        names += [POOLED] if any(representations[name].reads == "pooled" for name in by_name) else []
        self.projections = Projections(base, names, identity.stored_width, seed=seed)

    def _read(self, reads: Reads) -> list[LayerPair]:
        """Return the pairs of all losses that read states, or attention."""
        return [pair for name, pairs in self._pairs.items() if representations[name].reads == reads for pair in pairs]

    @contextmanager
    def watching(self, *, measures: bool = False) -> Iterator[None]:
        """Watch one forward pass of the student's body; `measures`: keep the states where gradients are
        measured, too.
        """
        with self._watch.on(shares=measures):
            yield

    def shared_states(self, final: Tensor) -> Tensor:
        """Return the states of a pass watched with `measures` that all terms share: [1, B, H], or `final` [S, H]
        itself.
        """
        return final if self._watch.shared is None else self._watch.shared

    def remove(self) -> None:
        """Stop watching the student and take its projections off, so that nothing of them is exported."""
        self._watch.clear()
        self._watch.remove()
        self.projections.remove()

    def values(
        self,
        terms: Sequence[LossTerm],
        final: Tensor,
        position_ids: Tensor,
        batch: Mapping[str, Tensor],
        num_positions: Tensor | float,
    ) -> list[Tensor]:
        """Return the value of each term, with gradient and without its weight, and drop what was watched.

        Args:
            terms: those of `representations`.
            final: [S, H] states after the last norm that predict the supervised tokens.
            position_ids: [1, B] of the batch.
            batch: tensors of the batch, `predictor_index` among them.
            num_positions: supervised positions of the global batch.
        """
        predictors, positions = batch["predictor_index"], position_ids[0]
        values = []
        for term in terms:
            reads = representations[term.name].reads
            if reads == "states":
                values.append(self._states(term, final, predictors, batch) / num_positions)
            elif reads == "attention":
                values.append(self._attention(term, predictors, positions, batch) / num_positions)
            else:
                values.append(self._pooled(term, final, batch) * (len(predictors) / num_positions))
        self._watch.clear()
        return values

    def _states(self, term: LossTerm, final: Tensor, predictors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over positions of the distance, averaged over pairs."""
        function, pairs = representations[term.name].function, self._pairs[term.name]
        total = final.new_zeros((), dtype=torch.float32)
        for pair in pairs:
            states = final if pair.student == FINAL else self._watch.states[pair.student].index_select(0, predictors)
            student = self.projections.projected(_projection_name(pair), states)
            total = total + function(student, teacher_states(batch, pair.column), **term.options).sum()
        return total / len(pairs)

    def _attention(self, term: LossTerm, predictors: Tensor, positions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over positions of the KL, averaged over pairs."""
        function, pairs = representations[term.name].function, self._pairs[term.name]
        visible = positions[predictors] + 1
        total = predictors.new_zeros((), dtype=torch.float32)
        for pair in pairs:
            distances, masses, rest = teacher_masses(batch, pair.column, visible)
            student, student_rest = stored_masses(self._watch.attention[pair.student], predictors, positions, distances)
            total = total + function(student, student_rest, masses, rest, **term.options).sum()
        return total / len(pairs)

    def _pooled(self, term: LossTerm, final: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over rows; 0, with its place in the graph, where there is no pair of rows to tell apart."""
        teacher, owner = teacher_pooled(batch), batch["pooled_row"]
        pooled = pool_rows(final, owner, len(teacher), self._identity.pooled)
        student = self.projections.projected(POOLED, pooled)
        if len(teacher) < 2:
            return student.sum() * 0.0 + final.float().sum() * 0.0
        return representations[term.name].function(student, teacher, **term.options).mean()


def pool_rows(states: Tensor, owner: Tensor, num_rows: int, how: str) -> Tensor:
    """Return [R, H] float32: mean or last of each row's states [S, H]; `owner` [S] is the row of each, -1 for none."""
    belongs = owner >= 0
    kept, rows = states[belongs].float(), owner[belongs]
    if how == "last":
        is_last = torch.ones_like(rows, dtype=torch.bool)
        is_last[:-1] = rows[1:] != rows[:-1]
        return kept[is_last]
    sums = kept.new_zeros(num_rows, states.shape[1]).index_add(0, rows, kept)
    return sums / torch.bincount(rows, minlength=num_rows).clamp_min(1)[:, None]


def _projection_name(pair: LayerPair) -> str:
    return f"teacher_{layer_name(pair.teacher)}_student_{layer_name(pair.student)}"

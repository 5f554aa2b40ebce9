"""The student's forward in training: body, then loss and head in one operator; logits are never held.

The base model's own `forward` is replaced, so everything that wraps a model (data parallel, FSDP, autocast, adapters)
stays in the path and the stock `compute_loss` of the Trainer works. Without `predictor_index` among the inputs the
original forward runs, so `generate` and evaluation are untouched.

Shape letters: B tokens of the packs, S supervised positions, H hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from student_train.batch.target_batch import TargetBatch, targets_in
from student_train.layers.layer_losses import LayerLosses
from student_train.losses import LossTerm, representations
from student_train.operator.fused_loss import FusedLoss, fused_sparse_loss
from student_train.operator.gradient_norms import brought_down, head_squares, value_squares
from student_train.operator.loss_terms import Targets
from student_train.operator.operator_choice import faster_operator
from student_train.student.router_loss import NAME as ROUTER
from student_train.student.router_loss import RouterLoss
from student_train.student.student_head import StudentHead, body_of, run_body

GRADIENT_SQUARE = "gradient_square/"
"""What the names of squared gradient norms begin with among the measured values."""


@dataclass(slots=True)
class Objective:
    """What the patched forward minimises now, and what it measured since the last `take`."""

    head: StudentHead
    layers: LayerLosses | None = None
    """Losses on the cache's hidden layer, where the stage has some."""
    terms: Sequence[LossTerm] = ()
    """Loss terms at the current step; the trainer sets them."""
    chunk_bytes: int | None = None
    """Budget of the fused loss's buffers; None: its own."""
    is_scoring: bool = False
    """Forward passes score positions instead of computing a loss."""
    operator: str = "torch"
    """Kernels of the fused loss; `auto` until the first pack has decided."""
    measures_gradients: bool = False
    """Forward passes also measure how strong each term's gradient is."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Weight of each of several teachers in what is scored, by key."""
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _scores: list[Tensor] = field(default_factory=list)
    _scores_by_layer: dict[str, list[Tensor]] = field(default_factory=dict)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: Targets,
        num_positions: Tensor | float,
        down: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> FusedLoss:
        """Return the loss of the head's terms; the first one decides on the operator, where a measurement must.

        `down` turns a gradient by `hidden` into that by the states where gradients are measured.
        """
        head, terms = self.head, [term for term in self.terms if term.name not in representations]
        if targets is None and any(term.layer for term in terms):  # no row of the batch has a teacher
            targets = {}
        if not terms:  # the head takes no part, but every process must still have a gradient of it
            return FusedLoss(hidden.new_zeros((), dtype=torch.float32) + head.weight[:1].float().sum() * 0.0, {})

        def fused(
            states: Tensor, operator: str, terms: Sequence[LossTerm] = terms, *, trains_head: bool = True
        ) -> FusedLoss:
            """Return the fused loss of some of the terms, with gradients for the head or without."""
            return fused_sparse_loss(
                states,
                head.weight if trains_head else head.weight.detach(),
                labels,
                targets,
                terms,
                num_positions,
                head_bias=head.bias if trains_head or head.bias is None else head.bias.detach(),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                vocab_size=head.vocab_size,
                chunk_bytes=self.chunk_bytes,
                operator=operator,
            )

        if self.operator == "auto":
            self.operator = faster_operator(
                lambda operator: fused(hidden.detach().requires_grad_(hidden.requires_grad), operator)
            )
        if self.measures_gradients:
            alone = functools.partial(fused, trains_head=False)
            self.record_gradients(
                head_squares(hidden, terms, lambda states, terms: alone(states, self.operator, terms), down)
            )
        return fused(hidden, self.operator)

    def record(self, loss: Tensor, values: dict[str, Tensor]) -> None:
        """Add one forward pass; all values are already divided by the global batch's positions."""
        measured = {"loss": loss, **values}
        for name, value in measured.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def take(self) -> dict[str, Tensor]:
        """Return the sums over the forward passes of one optimizer step, and start anew."""
        sums, self._sums = self._sums, {}
        return sums

    def record_gradients(self, squares: dict[str, Tensor]) -> None:
        """Add each term's squared gradient norm of one forward pass; passes are of different positions, so squares add
        up.
        """
        for key, square in squares.items():
            name = GRADIENT_SQUARE + key
            self._sums[name] = self._sums.get(name, torch.zeros_like(square)) + square

    def score(self, hidden: Tensor, labels: Tensor, targets: Targets) -> None:
        """Score the positions of one forward pass; several teachers' scores of a position are averaged by `shares`."""
        if isinstance(targets, TargetBatch):
            self._scores.append(self._scored(hidden, labels, targets))
            return
        total = torch.zeros(len(labels), 6, dtype=torch.float64)
        weights = torch.zeros(len(labels), 1, dtype=torch.float64)
        for key, batch in (targets or {}).items():
            assert batch.positions is not None
            assert batch.positions_host is not None
            own = replace(batch, positions=None, positions_host=None)
            scores = self._scored(hidden[batch.positions], labels[batch.positions], own)
            total.index_add_(0, batch.positions_host, scores * self.shares[key])
            weights[batch.positions_host] += self.shares[key]
            self._scores_by_layer.setdefault(key, []).append(scores)
        self._scores.append(total / weights)

    def _scored(self, hidden: Tensor, labels: Tensor, targets: TargetBatch) -> Tensor:
        """Return [S, 6] as `take_scores` does, of one teacher."""
        scores = self.head.scores(hidden, labels, targets)
        ones = torch.ones_like(scores.kl_nats)
        compared = targets.has_member.to(ones.device)
        columns = (scores.kl_nats, scores.top1_equal, scores.label_nll_nats, scores.acceptance, compared, ones)
        return torch.stack([column.double() for column in columns], dim=1).cpu()

    def take_scores(self) -> Tensor:
        """Return [S, 6] of the passes since the last call, float64: KL in nats, top-1 equal, NLL of the label in nats,
        acceptance, 1 where the teacher has a head or drawn tokens, 1.
        """
        scores, self._scores = self._scores, []
        return torch.cat([torch.zeros(0, 6, dtype=torch.float64), *scores])

    def take_scores_by_layer(self) -> dict[str, Tensor]:
        """Return the same, not averaged, of the positions that each of several teachers teaches."""
        scores, self._scores_by_layer = self._scores_by_layer, {}
        return {key: torch.cat(parts) for key, parts in scores.items()}


def patch_forward(model: Any, objective: Objective) -> None:
    """Make `model`, the causal language model below any adapter, return the fused loss of a batch from `collate`."""
    original = model.forward
    body, router = body_of(model), RouterLoss.of(model, objective.head.vocab_size)

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch, or keep its scores; without `predictor_index`, the model's own outputs."""
        if "predictor_index" not in kwargs:
            return original(input_ids=input_ids, position_ids=position_ids, labels=labels, **kwargs)
        assert input_ids is not None
        assert position_ids is not None
        assert labels is not None
        watches = objective.layers is not None and not objective.is_scoring
        measures = objective.measures_gradients
        with (
            objective.layers.watching(measures=measures) if objective.layers is not None and watches else nullcontext()
        ):
            hidden = run_body(body, input_ids, position_ids)[0].index_select(0, kwargs["predictor_index"])
        final = hidden
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.bfloat16:
            hidden = hidden.to(
                torch.bfloat16
            )  # the last norm gives float32; the head's products are to be as narrow as the body's
        if objective.is_scoring:
            objective.score(hidden, labels, targets_in(kwargs))
            return CausalLMOutput()
        targets = targets_in(kwargs)
        num_positions = _at_least_one(labels.numel() if num_items_in_batch is None else num_items_in_batch)
        shared = objective.layers.shared_states(final) if objective.layers is not None and measures else final
        fused = objective.loss(
            hidden, labels, targets, num_positions, functools.partial(brought_down, final=final, shared=shared)
        )
        loss, values = fused.loss, dict(fused.values)
        if objective.layers is not None:
            terms = [term for term in objective.terms if term.name in representations]
            found = objective.layers.values(terms, final, position_ids, kwargs, num_positions)
            if measures:
                by_name = {term.name: value for term, value in zip(terms, found, strict=True)}
                objective.record_gradients(value_squares(by_name, shared))
            for term, value in zip(terms, found, strict=True):
                loss = loss + term.weight * value
                values[term.name] = value.detach()
        if router is not None:
            balance = router.value(position_ids, kwargs["predictor_index"], num_positions)
            loss, values[ROUTER] = loss + balance, balance.detach()
        objective.record(loss, values)
        return CausalLMOutput(loss=loss)

    model.forward = MethodType(forward, model)


def _at_least_one(num_positions: Tensor | int) -> Tensor | float:
    """Return the denominator; a batch whose rows were all cut before their answers has no position and a loss of 0."""
    return num_positions.clamp_min(1) if isinstance(num_positions, Tensor) else float(max(num_positions, 1))


def restore_forward(model: Any) -> None:
    """Give the model its own forward back."""
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)

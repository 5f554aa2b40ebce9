"""Losses of a student's head against labels and sparse targets, with gradients, never holding [positions, vocabulary].

Chunk by chunk: logits of a chunk into a buffer, values and gradients of all terms in place (softmax_group.py),
gradients straight through the head (head_chunks.py). Since the gradient is made in the forward pass, nothing of
vocabulary size waits for the backward pass, which only multiplies by the incoming scalar. Terms of one teacher and one
temperature share one softmax; each other temperature or teacher adds one, on a copy of the logits of the positions that
it is about: the products with the head are made once, however many teachers there are. Cost at V = 151,936: the three
products of a plain head and about 3 passes over the logits; memory: the chunk and W's gradient.

Shape letters: S positions, S_l those that a teacher is about, H hidden width, V vocabulary, C positions of a chunk, W
width of a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import TrainingError
from student_train.losses import LossTerm, likelihoods
from student_train.operator.chunk_likelihood import chunk_value, label_logprobs
from student_train.operator.head_chunks import Head, HeadGradients, check_positions, chunks
from student_train.operator.loss_terms import Targets, TermGroup, group_terms, term_keys
from student_train.operator.softmax_group import group_values_and_gradient


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """A batch's loss, in nats per position of the global batch."""

    loss: Tensor
    """Scalar with gradient: the sum of weight x value."""
    values: dict[str, Tensor]
    """Each term's value, T^2 included and weight not, by `term_keys`; detached scalars."""


def fused_sparse_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    targets: Targets,
    terms: Sequence[LossTerm],
    num_positions: float | Tensor,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_positions: int | None = None,
    chunk_bytes: int | None = None,
    operator: str = "torch",
) -> FusedLoss:
    """Return the weighted sum of divergences in nats per position, and each term's value.

    `hidden` [S, H] predicts `labels` [S] int64 and `targets`; `head_weight` [rows, H], of which the first `vocab_size`
    (default: all) are the vocabulary; `num_positions` counts the global batch's supervised positions. `targets` may be
    None where every term is on labels; several teachers' targets come by the `layer` of their terms, each for its own
    positions. Chunks are as long as `chunk_bytes` of buffers allow, or `chunk_positions`.
    `operator` "triton" streams over tiles of the vocabulary instead (tiled_loss.py); it has no chunks of positions, but
    for losses on likelihoods.

    Raises:
        TrainingError: a term is unknown, its temperature was not captured or it cannot be had from drawn tokens; or ids
        lie outside the vocabulary.
    """
    head = Head.of(hidden, head_weight, head_bias, logit_scale, softcap, vocab_size)
    for batch in targets.values() if isinstance(targets, Mapping) else (targets,):
        check_positions(head.vocab_size, hidden, labels, batch)
    if isinstance(num_positions, Tensor):
        num_positions = num_positions.to(head.dtype)
    elif num_positions <= 0:
        raise TrainingError(f"the global batch has {num_positions:g} supervised positions; it needs at least one")
    keyed = dict(zip(term_keys(terms), terms, strict=True))
    on_chunks = {key: term for key, term in keyed.items() if term.name in likelihoods}
    values, loss = {}, None
    if len(on_chunks) < len(terms) or not terms:
        plain = {key: term for key, term in keyed.items() if key not in on_chunks}
        groups = group_terms(list(plain.values()), targets, num_positions)
        call = _Call(head, labels, groups, len(plain), chunk_positions, chunk_bytes, operator, torch.is_grad_enabled())
        loss, sums = _FusedSparseLoss.apply(hidden, head_weight, head_bias, call)
        values = {key: sums[i] * (term.temperature**2) / num_positions for i, (key, term) in enumerate(plain.items())}
    if on_chunks:
        logprobs = label_logprobs(head, hidden, head_weight, head_bias, labels, chunk_positions, chunk_bytes)
        for key, term in on_chunks.items():
            value = chunk_value(term, logprobs, targets) / num_positions
            loss = term.weight * value if loss is None else loss + term.weight * value
            values[key] = value.detach()
    assert loss is not None
    return FusedLoss(loss, {key: values[key] for key in keyed})


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Everything that the autograd function needs and that has no gradient."""

    head: Head
    labels: Tensor
    groups: Sequence[TermGroup]
    num_terms: int
    chunk_positions: int | None
    chunk_bytes: int | None
    operator: str
    grad_enabled: bool


class _FusedSparseLoss(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Loss and gradients in one pass; backward multiplies by the incoming scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        """Return the loss and the sums [terms] of the terms' values at their temperatures, without T^2."""
        wanted = [needed and call.grad_enabled for needed in ctx.needs_input_grad[:3]]
        asked_for = [x if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)]
        with torch.autocast(hidden.device.type, enabled=False):
            head, gradients = call.head, HeadGradients.zeros(call.head, *asked_for)
            sums = torch.zeros(call.num_terms, dtype=head.dtype, device=hidden.device)
            if call.operator == "triton":
                from student_train.operator.tiled_loss import run_tiles

                labels, budget = call.labels, call.chunk_bytes
                run_tiles(head, hidden, labels, call.groups, sums, gradients, budget, want=any(wanted))
            else:
                _run_chunks(call, hidden, sums, gradients, want_gradient=any(wanted))
        ctx.gradients = [gradients.hidden, gradients.weight, gradients.bias]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sums)
        terms = (term for group in call.groups for term in group.terms)
        loss = sum((term.coefficient * sums[term.index] for term in terms), start=sums.new_zeros(()))
        return loss, sums

    @staticmethod
    def backward(
        ctx: Any, loss_gradient: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Scale the gradients in place and hand them over, once."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the fused loss hands its gradients over, so its backward pass runs once; call the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(loss_gradient)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        hidden, weight, bias = (None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs)
        return hidden, weight, bias, None


def _run_chunks(call: _Call, hidden: Tensor, sums: Tensor, gradients: HeadGradients, *, want_gradient: bool) -> None:
    """Add each term's sum over all positions to `sums` [terms], and the gradients of every chunk."""
    head, groups = call.head, call.groups
    with_slope = head.softcap is not None and want_gradient
    most = 2 if want_gradient else 1
    is_whole = all(group.positions is None for group in groups)
    num_copies = min(max(len(groups) - 1, 0), most) if is_whole and groups else most
    num_buffers = 1 + num_copies + with_slope
    size = head.chunk_size(len(hidden), num_buffers, call.chunk_positions, call.chunk_bytes)
    buffers = [head.buffer(size) for _ in range(num_buffers)]
    for where in chunks(len(hidden), size):
        logits, *spare = (buffer[: where.stop - where.start] for buffer in buffers)
        slope = spare.pop() if with_slope else None
        inputs = head.input_of(hidden[where])
        head.logits_into(logits, inputs, slope)
        gradient = _run_groups(call, where, logits, spare, sums, want_gradient=want_gradient)
        if want_gradient:
            if slope is not None:
                gradient[:, : head.vocab_size].mul_(slope[:, : head.vocab_size])
            gradients.add(head, where, inputs, gradient)


def _run_groups(
    call: _Call, where: slice, logits: Tensor, spare: list[Tensor], sums: Tensor, *, want_gradient: bool
) -> Tensor:
    """Return the buffer that holds the gradient by logits, all teachers and temperatures added up.

    Groups of some positions come first, on copies of their rows; the last group of all works on the logits themselves.
    """
    whole = [group for group in call.groups if group.positions is None]
    parts = [group for group in call.groups if group.positions is not None]
    total = spare[0].zero_() if want_gradient and (parts or not whole) else None
    labels = call.labels[where]
    for group in parts:
        assert group.targets is not None
        own, at = group.targets.within(where)
        if len(at) == 0:
            continue
        rows = torch.index_select(logits, 0, at, out=spare[-1][: len(at)])
        _run_group(call, group, own, rows, labels[at], sums, want_gradient=want_gradient)
        if total is not None:
            total.index_add_(0, at, rows)
    for i, group in enumerate(whole):
        work = logits if i == len(whole) - 1 else spare[0 if total is None else -1].copy_(logits)
        _run_group(call, group, where, work, labels, sums, want_gradient=want_gradient)
        if total is None:
            total = work
        elif want_gradient:
            total.add_(work)
    return logits if total is None else total


def _run_group(
    call: _Call, group: TermGroup, own: slice, work: Tensor, labels: Tensor, sums: Tensor, *, want_gradient: bool
) -> None:
    """Turn logits into a group's gradient; `own` are the positions among those of its targets."""
    members = None
    if group.targets is not None and group.needs_members:
        head = call.head
        members = group.targets.members(
            own, group.temperature, head.vocab_size, head.dtype, with_draws=group.with_draws
        )
    group_values_and_gradient(work, labels, members, group.terms, group.temperature, sums, want_gradient=want_gradient)

"""Losses on the likelihood of chunks of text: the student's log-likelihood of each, and its gradient through the head.

A chunk begins at each position where the teacher has a member (its head, or drawn tokens), and where a row does, and
goes on over those where it has none; the teacher's log-likelihood is the sum of its labels, and a chunk with one that
is not known (-inf) does not count. On a layer in the teacher's own tokens every position is a chunk. The student's is
the sum of its label log-probabilities, computed in chunks of positions and once more in the backward pass, so that
logits are never held.
Cost: two products with the head beside those of the gradients, and a few passes over each buffer.

Shape letters: S positions, H hidden width, V vocabulary, A chunks of text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.errors import TrainingError
from student_train.losses import LossTerm, likelihoods
from student_train.operator.head_chunks import Head, HeadGradients, chunks
from student_train.operator.loss_terms import Targets, check_term, targets_of


def chunk_value(term: LossTerm, label_logprobs: Tensor, targets: Targets) -> Tensor:
    """Return the sum of a term's values over the batch's chunks; its weight is left out.

    Args:
        term: of a loss on likelihoods.
        label_logprobs: [S] the student's.
        targets: the teacher's, or those of several teachers by layer.

    Raises:
        TrainingError: the batch has no targets, or the loss has not what the term asks for.
    """
    loss = likelihoods[term.name]
    check_term(term, loss)
    batch = targets_of(term, targets)
    if batch is None:
        return label_logprobs.sum() * 0.0
    if batch.label_logprobs is None:
        raise TrainingError(f"loss '{term.name}' needs `label_logprobs` among the teacher's targets; add them")
    ours = label_logprobs if batch.positions is None else label_logprobs[batch.positions]
    chunk = (batch.begins_chunk.long().cumsum(0) - 1).clamp_min(0)
    sums = torch.zeros_like(ours).index_add(0, chunk, ours)
    told = torch.zeros_like(sums).index_add(0, chunk, batch.label_logprobs.to(sums.dtype))
    counts = torch.isfinite(told) & (torch.bincount(chunk, minlength=len(sums)) > 0)
    return loss.function(told[counts], sums[counts], **term.options).sum()


def label_logprobs(
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk_positions: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return [S] log-probabilities in nats of the labels at temperature 1, differentiable in states and head."""
    found: Tensor = _LabelLogprobs.apply(hidden, weight, bias, head, labels, chunk_positions, chunk_bytes)
    return found


class _LabelLogprobs(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Label log-probabilities; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        chunk_positions: int | None,
        chunk_bytes: int | None,
    ) -> Tensor:
        """Return [S] log-probabilities; keep the states and not the logits."""
        found = torch.empty(len(labels), dtype=head.dtype, device=hidden.device)
        size = head.chunk_size(len(labels), 2, chunk_positions, chunk_bytes)
        buffer = head.buffer(size)
        with torch.autocast(hidden.device.type, enabled=False):
            for where in chunks(len(labels), size):
                logits = buffer[: where.stop - where.start]
                head.logits_into(logits, head.input_of(hidden[where]))
                at_label = logits.gather(1, labels[where, None])[:, 0]
                found[where] = at_label - torch.logsumexp(logits, 1)
        ctx.save_for_backward(hidden, labels)
        ctx.head, ctx.size = head, size
        ctx.weights = [weight.detach(), None if bias is None else bias.detach()]
        return found

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients by states, weight and bias, of logits that are made again."""
        hidden, labels = ctx.saved_tensors
        head, inputs = ctx.head, [hidden, *ctx.weights]
        wanted = ctx.needs_input_grad[:3]
        gradients = HeadGradients.zeros(head, *(x if want else None for x, want in zip(inputs, wanted, strict=True)))
        buffer = head.buffer(ctx.size)
        slope_buffer = None if head.softcap is None else head.buffer(ctx.size)
        with torch.autocast(hidden.device.type, enabled=False):
            for where in chunks(len(labels), ctx.size):
                logits = buffer[: where.stop - where.start]
                slope = None if slope_buffer is None else slope_buffer[: where.stop - where.start]
                rows = head.input_of(hidden[where])
                head.logits_into(logits, rows, slope)
                logits.sub_(torch.logsumexp(logits, 1, keepdim=True)).exp_().mul_(-slopes[where, None])
                logits.scatter_add_(1, labels[where, None], slopes[where, None])
                if slope is not None:
                    logits[:, : head.vocab_size].mul_(slope[:, : head.vocab_size])
                gradients.add(head, where, rows, logits)
        found = [gradients.hidden, gradients.weight, gradients.bias]
        typed = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]
        return (*typed, None, None, None, None)

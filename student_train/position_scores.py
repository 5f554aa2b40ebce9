"""What the student gives to held-out positions: divergence from the teacher, agreement and likelihood, position by position, no
gradient.

KL(teacher || student) at T = 1 in nats over the head and the tail's bucket: a lower bound on the full KL, exact on the head. Only
where there is no head (mode `sample`) the drawn tokens take its place; the value is then the KL of their empirical distribution,
which exceeds the true one by an amount that does not depend on the student: good for comparing students on one cache, not across
caches.
Cost: one matrix product and four passes over each chunk's logits.

Shape letters: S positions, H hidden width, V vocabulary, C positions of a chunk, K members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.head_chunks import Head, check_positions
from student_train.losses.forward_kl import forward_kl
from student_train.softmax_group import finite, student_masses
from student_train.target_batch import TargetBatch


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Scores of S positions."""

    kl_nats: Tensor
    """[S] float32 KL(teacher || student)."""
    top1_equal: Tensor
    """[S] bool: the student's most likely token is the teacher's; False where the teacher has no member."""
    label_nll_nats: Tensor
    """[S] float32 negative log-likelihood of the label."""


def evaluate_positions(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    targets: TargetBatch,
    *,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_positions: int | None = None,
) -> PositionScores:
    """Score positions: `hidden` [S, H] predicts `labels` [S] int64 and `targets`; the head as in `fused_sparse_loss`.

    Raises:
        TrainingError: ids lie outside the vocabulary.
    """
    head = Head.of(hidden, head_weight, head_bias, logit_scale, softcap, vocab_size)
    check_positions(head, hidden, labels, targets)
    num_positions = len(labels)
    kl = torch.empty(num_positions, dtype=torch.float32, device=hidden.device)
    nll = torch.empty_like(kl)
    equal = torch.empty(num_positions, dtype=torch.bool, device=hidden.device)
    buffer = head.buffer(head.chunk_size(num_positions, 1, chunk_positions))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for where in head.chunks(num_positions, 1, chunk_positions):
            logits = buffer[: where.stop - where.start]
            head.logits_into(logits, head.input_of(hidden[where]))
            kl[where], equal[where], nll[where] = _score_chunk(logits, labels[where], targets, where, head)
    return PositionScores(kl, equal, nll)


def _score_chunk(logits: Tensor, labels: Tensor, targets: TargetBatch, where: slice, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL, top-1 equality and label NLL, each [C]; the logits [C, W] are used up."""
    with_draws = targets.has_only_draws
    members = targets.members(where, 1.0, head.vocab_size, head.dtype, with_draws=with_draws)
    best = logits.argmax(1)
    label_logits = logits.gather(1, labels[:, None])
    log_q, log_total, _ = student_masses(logits, members.ids)
    equal = torch.zeros_like(best, dtype=torch.bool)
    if members.ids.shape[1]:
        first = members.log_p[:, :-1].argmax(1) if with_draws else torch.zeros_like(best)
        equal = best == members.ids.gather(1, first[:, None])[:, 0]
    return forward_kl(finite(members.log_p), log_q), equal, (log_total - label_logits)[:, 0]

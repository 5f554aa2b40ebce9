"""What the student gives to held-out positions: divergence from the teacher, agreement and likelihood, position by
position, no gradient.

KL(teacher || student) at T = 1 in nats over the head and the tail's bucket: a lower bound on the full KL, exact on the
head. Only where there is no head (mode `sample`) the drawn tokens take its place; the value is then the KL of their
empirical distribution,
which exceeds the true one by an amount that does not depend on the student: good for comparing students on one cache,
not across caches.
The acceptance rate of speculative decoding, sum min(p, q) over the vocabulary (2211.17192), lies between the sum over
the head and that with the tails' masses as one token each; both ends are given.
Where the teacher's tail is not known (imported targets), the KL is that within the head, and acceptance is NaN.
Cost: one matrix product and four passes over each chunk's logits.

Shape letters: S positions, H hidden width, V vocabulary, C positions of a chunk, K members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.batch.target_batch import Members, TargetBatch
from student_train.losses.forward_kl import forward_kl
from student_train.losses.head_kl import head_kl
from student_train.operator.head_chunks import Head, check_positions, chunks
from student_train.operator.softmax_group import finite, student_masses


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Scores of S positions."""

    kl_nats: Tensor
    """[S] float32 KL(teacher || student)."""
    top1_equal: Tensor
    """[S] bool: the student's most likely token is the teacher's; False where the teacher has no member."""
    label_nll_nats: Tensor
    """[S] float32 negative log-likelihood of the label."""
    top1_in_teacher_top5: Tensor
    """[S] bool: the student's most likely token is among the teacher's five most likely members (all where it has
    fewer).
    """
    top1_is_label: Tensor
    """[S] bool: the student's most likely token is the label."""
    top1_logprob: Tensor
    """[S] float32 log-probability that the student gives its most likely token."""
    acceptance: Tensor
    """[S] float32 sum of min(p, q) over the head: at least that share of the student's drafts the teacher accepts."""
    acceptance_at_most: Tensor
    """[S] float32 the same with all other tokens as one."""


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
    check_positions(head.vocab_size, hidden, labels, targets)
    num_positions = len(labels)
    kl, nll, top1, least, most = (torch.empty(num_positions, device=hidden.device) for _ in range(5))
    equal, in_top5, is_label = (torch.empty(num_positions, dtype=torch.bool, device=hidden.device) for _ in range(3))
    scores = PositionScores(kl, equal, nll, in_top5, is_label, top1, least, most)
    size = head.chunk_size(num_positions, 1, chunk_positions)
    buffer = head.buffer(size)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for where in chunks(num_positions, size):
            logits = buffer[: where.stop - where.start]
            head.logits_into(logits, head.input_of(hidden[where]))
            _score_chunk(logits, labels[where], targets, where, head, scores)
    return scores


def _score_chunk(
    logits: Tensor, labels: Tensor, targets: TargetBatch, where: slice, head: Head, scores: PositionScores
) -> None:
    """Write the scores of the positions `where`; the logits [C, W] are used up."""
    with_draws = targets.has_only_draws
    members = targets.members(where, 1.0, head.vocab_size, head.dtype, with_draws=with_draws)
    best_logits, best = logits.max(1)
    label_logits = logits.gather(1, labels[:, None])[:, 0]
    log_q, log_total, _ = student_masses(logits, members.ids)
    likeliest = _likeliest_members(members, with_draws=with_draws)
    divergence = forward_kl if targets.tail_is_known else head_kl
    scores.kl_nats[where] = divergence(finite(members.log_p), log_q).float()
    p, q = (_with_one_tail(log_masses, members.num_head).exp() for log_masses in (members.log_p, log_q))
    accepted = torch.minimum(p, q).float()
    if not targets.tail_is_known:
        accepted.fill_(torch.nan)
    scores.acceptance[where], scores.acceptance_at_most[where] = accepted[:, :-1].sum(1), accepted.sum(1)
    scores.top1_equal[where] = (likeliest[:, :1] == best[:, None]).any(1)
    scores.label_nll_nats[where] = (log_total[:, 0] - label_logits).float()
    scores.top1_in_teacher_top5[where] = (likeliest == best[:, None]).any(1)
    scores.top1_is_label[where] = best == labels
    scores.top1_logprob[where] = (best_logits - log_total[:, 0]).float()


def _with_one_tail(log_masses: Tensor, num_head: int) -> Tensor:
    """Return [C, num_head + 1] log-masses of the head and of all other tokens together."""
    return torch.cat([log_masses[:, :num_head], log_masses[:, num_head:].logsumexp(1, keepdim=True)], 1)


def _likeliest_members(members: Members, *, with_draws: bool) -> Tensor:
    """Return [C, up to 5] ids of the teacher's most likely members, best first; a slot that is padded
    equals no token.
    """
    if not with_draws:  # a head is sorted already, and its padding comes last
        return members.ids[:, :5]
    order = members.log_p[:, :-1].sort(dim=1, descending=True, stable=True).indices
    return members.ids.gather(1, order[:, :5])

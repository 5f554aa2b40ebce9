"""All terms of one temperature on one chunk: values, and the gradient by logits written over the logits.

With z the logits at T and M the members' columns: read z at M, write -inf there, so that the rest has an exact
log-sum-exp l (a tail of 1 - sum of members would lose half of its gradient at 2e-8); the masses q are the members' and
the bucket's. Divergences see log p and log q alone; with u = dD/dlog q, U = sum(u) - a and a the weight of
cross-entropy, the gradient by z is
    u - q U                                    at members (overwritten: nothing of size p/q is added and cancelled)
    exp(z - l) (u_bucket - q_bucket U)         elsewhere
    and - a at the label.
Cost: four passes over [C, W] (maximum, exp, sum, scale), one exp per logit however many terms there are; the rest is
    [C, K].

Shape letters: C positions of the chunk, K members, V vocabulary, W width of the buffer (above V; column V is the dump
of padded slots).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from student_train.batch.target_batch import Members
from student_train.losses import ZERO_LOG_MASS
from student_train.operator.loss_terms import WeightedDivergence


def group_values_and_gradient(
    logits: Tensor,
    labels: Tensor,
    members: Members | None,
    terms: Sequence[WeightedDivergence],
    temperature: float,
    values: Tensor,
    *,
    want_gradient: bool,
) -> None:
    """Add each term's sum over the chunk to `values` [terms]; turn `logits` [C, W], plain ones, into their gradient in
    place.

    `members` is None where no term needs the teacher. Without `want_gradient` the buffer is left with rubbish.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    label_logits = logits.gather(1, labels[:, None])
    ids = labels.new_empty(len(labels), 0) if members is None else members.ids
    log_q, log_total, rest_sum = student_masses(logits, ids)
    gradient, label_weight = mass_gradients(
        log_q, label_logits - log_total, members, terms, temperature, values, want_gradient=want_gradient
    )
    if not want_gradient:
        return
    logits.mul_(gradient[:, -1:] / rest_sum)
    logits.scatter_(1, ids, gradient[:, :-1])
    if label_weight is not None:
        logits.scatter_(1, labels[:, None], logits.gather(1, labels[:, None]) - label_weight)


def mass_gradients(
    log_q: Tensor,
    label_logprobs: Tensor,
    members: Members | None,
    terms: Sequence[WeightedDivergence],
    temperature: float,
    values: Tensor,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | float | None]:
    """Add each term's sum over the positions to `values`; return [C, K + 1] gradients and what to subtract at labels.

    `log_q` [C, K + 1] and `label_logprobs` [C, 1] are the student's at the temperature. A member's gradient is by its
    logit; the last one is shared out over all other tokens by their share of the rest. The second is None without a
    term on labels.
    """
    on_members = [term for term in terms if not term.on_labels]
    on_labels = [term for term in terms if term.on_labels]
    for term in on_labels:
        values[term.index] += term.function(torch.zeros_like(label_logprobs), label_logprobs).sum()
    slopes = torch.zeros_like(log_q)
    if members is not None:
        slopes = _slopes(members, log_q, on_members, values, want_gradient=want_gradient)
    label_weight: Tensor | float = sum((term.coefficient for term in on_labels), start=0.0)
    slopes = slopes / temperature
    total_slope = slopes.sum(1, keepdim=True) - label_weight
    return slopes - log_q.exp() * total_slope, label_weight if on_labels else None


def finite(log_masses: Tensor) -> Tensor:
    """Return log-masses with `ZERO_LOG_MASS` in place of -inf.

    A mass that is just that, as a stored code may give at a low temperature, is moved a little: it is not empty.
    """
    told = torch.where(log_masses == ZERO_LOG_MASS, ZERO_LOG_MASS * (1 - 1e-6), log_masses)
    return told.masked_fill(log_masses == -torch.inf, ZERO_LOG_MASS)


def student_masses(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a softmax into members `ids` [C, K] and the rest; `logits` [C, W] become exp(logits - row maximum) of the
    rest, 0 at members.

    Returns finite natural logs of the masses [C, K + 1], the rest last; the log-sum-exp [C, 1] of all logits; and the
    row sums [C, 1] of what the buffer holds now (1 where there is no rest, so that nothing is divided by 0).
    """
    at_members = logits.gather(1, ids)
    logits.scatter_(1, ids, -torch.inf)
    row_max = logits.amax(1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    logits.sub_(row_max).exp_()
    rest_sum = logits.sum(1, keepdim=True)
    unnormalised = torch.cat([at_members, row_max + rest_sum.log()], dim=1)
    log_total = torch.logsumexp(unnormalised, dim=1, keepdim=True)
    return finite(unnormalised - log_total), log_total, rest_sum.masked_fill(rest_sum == 0, 1.0)


def _slopes(
    members: Members, log_q: Tensor, terms: Sequence[WeightedDivergence], values: Tensor, *, want_gradient: bool
) -> Tensor:
    """Return [C, K + 1] the derivative of the weighted divergences by log q; add their sums to `values`."""
    log_p = finite(members.log_p)
    with torch.set_grad_enabled(want_gradient):
        leaf = log_q.detach().requires_grad_(want_gradient)
        total = leaf.new_zeros(())
        for term in terms:
            value = term.values(log_p, leaf, members.num_head).sum()
            values[term.index] += value.detach()
            total = total + term.coefficient * value
    if not want_gradient or not terms:
        return torch.zeros_like(log_q)
    (slopes,) = torch.autograd.grad(total, leaf)
    return slopes

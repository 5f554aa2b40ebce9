"""Losses on sparse targets for any training loop: the fused operator, and a plain form for small work.

A term is made by the function of its name, `forward_kl(weight=0.9, temperature=2.0)`; a loss is the weighted sum of its
terms in nats per supervised position. Values and gradients of a divergence at temperature T are multiplied by T^2.

Shape letters: B tokens of a batch, S supervised positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from shared.errors import TrainingError
from shared.recipe.base import first_problem
from shared.recipe.sections.losses import Loss
from student_train.batch.target_batch import Members, TargetBatch
from student_train.losses import LossTerm
from student_train.operator.fused_loss import fused_sparse_loss
from student_train.operator.head_chunks import check_positions
from student_train.operator.loss_terms import group_terms
from student_train.operator.softmax_group import finite
from student_train.student.student_head import StudentHead, check_head, head_of, refuse_adapted_head


def cross_entropy(weight: float = 1.0) -> LossTerm:
    """Return cross-entropy with the tokens of the text, at temperature 1."""
    return _term("cross_entropy", weight)


def forward_kl(weight: float = 1.0, temperature: float = 1.0) -> LossTerm:
    """Return KL(teacher || student)."""
    return _term("forward_kl", weight, temperature=temperature)


def reverse_kl(weight: float = 1.0, temperature: float = 1.0) -> LossTerm:
    """Return KL(student || teacher)."""
    return _term("reverse_kl", weight, temperature=temperature)


def head_kl(weight: float = 1.0, temperature: float = 1.0) -> LossTerm:
    """Return forward KL given that the token is in the teacher's head: for layers whose tail is unknown."""
    return _term("head_kl", weight, temperature=temperature)


def jsd(weight: float = 1.0, temperature: float = 1.0, beta: float = 0.5) -> LossTerm:
    """Return the generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture (2306.13649)."""
    return _term("jsd", weight, temperature=temperature, beta=beta)


def skew_forward_kl(weight: float = 1.0, temperature: float = 1.0, skew: float = 0.1) -> LossTerm:
    """Return KL(teacher || (1 - skew) student + skew teacher) (DistiLLM, 2402.03898)."""
    return _term("skew_forward_kl", weight, temperature=temperature, skew=skew)


def skew_reverse_kl(weight: float = 1.0, temperature: float = 1.0, skew: float = 0.1) -> LossTerm:
    """Return KL(student || (1 - skew) teacher + skew student) (DistiLLM, 2402.03898)."""
    return _term("skew_reverse_kl", weight, temperature=temperature, skew=skew)


def tail_weighted_kl(weight: float = 1.0, temperature: float = 1.0, tail_weight: float = 2.0) -> LossTerm:
    """Return KL over head and bucket + `tail_weight` times the KL within the tail, known from draws (2602.20816)."""
    return _term("tail_weighted_kl", weight, temperature=temperature, tail_weight=tail_weight)


def decoupled_kl(weight: float = 1.0, head_temperature: float = 2.0) -> LossTerm:
    """Return KL of head against bucket at temperature 1 and within the head at `head_temperature` (2203.08679)."""
    return _term("decoupled_kl", weight, head_temperature=head_temperature)


def _term(name: str, weight: float, **options: float) -> LossTerm:
    """Return a term whose options are what a recipe may say of it; any number is a weight.

    Raises:
        TrainingError: one of them is not.
    """
    if not isinstance(weight, Number | Tensor):
        raise TrainingError(f"{name}: weight: expected a number, found {weight!r}")
    try:
        TypeAdapter(Loss).validate_python({"name": name, **options})
    except ValidationError as error:
        raise TrainingError(f"{name}: {': '.join(first_problem(error, options))}") from None
    return LossTerm(name, weight, options.pop("temperature", 1.0), options)


def sparse_loss(
    hidden: Tensor,
    head: Tensor | torch.nn.Module,
    batch: Mapping[str, Tensor],
    terms: Sequence[LossTerm],
    *,
    num_positions: float | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the loss of a batch in nats per position, without ever holding [S, V] logits; differentiable.

    Args:
        hidden: [1, B, H] last hidden states of the body, or [S, H] those that predict (`batch["predictor_index"]`).
        head: the causal language model that `hidden` comes from, with or without an adapter of peft, whose output
            layer, scale and soft cap are read from it and compared with its own logits at the first call; or its
            Linear, or the weight [V, H], which say nothing of what the model does to its logits.
        batch: as `TorchDataset.collate` returns it, on the device of `hidden`.
        terms: such as `[forward_kl(0.9), cross_entropy(0.1)]`.
        num_positions: supervised positions of the global batch, where it is made of several; default: this batch's.
        vocab_size: rows of the head that are the vocabulary, where it is padded; default: all.
        logit_scale: what the model multiplies its logits by, where `head` is a Linear or a weight.
        softcap: c where the model makes c tanh(logits / c) of them then (Gemma 2), likewise.

    Raises:
        TrainingError: shapes are not those of the batch, a temperature was not captured, a term cannot be had from
            these targets, the output layer has an adapter on it, or the model makes its logits in a way that its config
            does not say.

    >>> import torch, decant
    >>> data = decant.TorchDataset(decant.open_cache("data/golden/run-1/cache"), pack_tokens=128)
    >>> batch = data.collate([data[0]])
    >>> hidden = torch.zeros(1, batch["input_ids"].shape[1], 4, requires_grad=True)
    >>> loss = decant.sparse_loss(hidden, torch.zeros(512, 4), batch, [decant.cross_entropy()])
    >>> round(float(loss.detach()), 4)      # a head of zeros says log 512 everywhere
    6.2383
    """
    predicting = _predicting("hidden", hidden, batch)
    if hasattr(head, "get_base_model"):  # adapters of peft are below it already
        head = head.get_base_model()
    if hasattr(head, "get_output_embeddings"):
        if (logit_scale, softcap) != (1.0, None):
            raise TrainingError("the model says its logit_scale and softcap itself; leave them out, or give its Linear")
        known = _checked_head(head, vocab_size)
        head, vocab_size, logit_scale, softcap = known.module, known.vocab_size, known.logit_scale, known.softcap
    refuse_adapted_head(head)
    weight, bias = (head, None) if isinstance(head, Tensor) else (head.weight, getattr(head, "bias", None))
    labels = batch["labels"]
    found = fused_sparse_loss(
        predicting,
        weight,
        labels,
        _targets(batch, terms),
        terms,
        len(labels) if num_positions is None else num_positions,
        head_bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    return found.loss


_CHECKED: WeakKeyDictionary[Any, dict[int | None, StudentHead]] = WeakKeyDictionary()
"""Heads of the models that were compared with their own logits, by the rows that are the vocabulary."""


def _checked_head(model: Any, vocab_size: int | None) -> StudentHead:
    """Return a model's head, compared with the model's own logits when it is first asked for."""
    heads = _CHECKED.setdefault(model, {})
    if vocab_size not in heads:
        head = head_of(model, vocab_size or 1)
        head = head if vocab_size else replace(head, vocab_size=head.weight.shape[0])
        check_head(model, head)
        heads[vocab_size] = head
    return heads[vocab_size]


def sparse_loss_from_logits(
    logits: Tensor, batch: Mapping[str, Tensor], terms: Sequence[LossTerm], *, num_positions: float | None = None
) -> Tensor:
    """Return the same loss from logits, [1, B, V] or [S, V], by autograd: for small vocabularies and for checking.

    Raises:
        TrainingError: as for `sparse_loss`.

    >>> import torch, decant
    >>> data = decant.TorchDataset(decant.open_cache("data/golden/run-1/cache"), pack_tokens=128)
    >>> batch = data.collate([data[0]])
    >>> logits = torch.zeros(1, batch["input_ids"].shape[1], 512)
    >>> round(float(decant.sparse_loss_from_logits(logits, batch, [decant.cross_entropy()])), 4)
    6.2383
    """
    predicting = _predicting("logits", logits, batch)
    labels, targets = batch["labels"], _targets(batch, terms)
    check_positions(predicting.shape[1], predicting, labels, targets)
    count = len(labels) if num_positions is None else num_positions
    dtype = torch.promote_types(predicting.dtype, torch.float32)
    total = predicting.new_zeros((), dtype=dtype)
    for group in group_terms(terms, targets, count):
        z = predicting.to(dtype) / group.temperature
        label_logprobs = z.log_softmax(-1).gather(1, labels[:, None])
        for term in group.terms:
            if term.on_labels:
                total = total + term.coefficient * term.function(torch.zeros_like(label_logprobs), label_logprobs).sum()
                continue
            assert targets is not None
            members = targets.members(
                slice(0, len(labels)), group.temperature, z.shape[1], dtype, with_draws=group.with_draws
            )
            values = term.values(finite(members.log_p), _masses(z, members), members.num_head)
            total = total + term.coefficient * values.sum()
    return total


def _predicting(name: str, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return [S, ...] of the positions that predict.

    Raises:
        TrainingError: the values or the batch are of another shape or kind.
    """
    labels, found = batch.get("labels"), list(values.shape)
    if not isinstance(labels, Tensor) or not values.is_floating_point():
        raise TrainingError(f"{name}: expected real numbers, and a batch as TorchDataset.collate returns it")
    num_tokens, num_positions = batch["input_ids"].shape[1], len(labels)
    if found[:-1] == [1, num_tokens]:
        return values[0][batch["predictor_index"]]
    if found[:-1] != [num_positions]:
        raise TrainingError(
            f"{name}: expected shape [1, {num_tokens}, ...] of all tokens of the batch, or [{num_positions}, ...] of "
            f"those that predict, found {found}"
        )
    return values


def _masses(z: Tensor, members: Members) -> Tensor:
    """Return [S, K + 1] finite natural logs of the student's masses at the members and, last, of the rest."""
    padded = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)  # column V, which padded slots point at
    rest = padded.scatter(1, members.ids, -torch.inf)
    is_empty = (rest == -torch.inf).all(1, keepdim=True)
    log_rest = torch.logsumexp(rest.masked_fill(is_empty, 0.0), dim=1, keepdim=True).masked_fill(is_empty, -torch.inf)
    masses = torch.cat([padded.gather(1, members.ids), log_rest], dim=1)
    return finite(masses - torch.logsumexp(z, dim=1, keepdim=True))


def _targets(batch: Mapping[str, Any], terms: Sequence[LossTerm]) -> TargetBatch | None:
    if isinstance(terms, LossTerm | str) or not all(isinstance(term, LossTerm) for term in terms):
        raise TrainingError(f"terms: expected a list such as [decant.forward_kl(0.9)], found {str(terms)[:60]}")
    if "support_counts" in batch:
        return TargetBatch.from_batch(batch)
    if any(term.name != "cross_entropy" for term in terms):
        raise TrainingError("the batch has labels alone; open the cache with a targets layer, or use cross_entropy")
    return None

r"""What a capture leaves out, by k, mass, draws and temperature: from dense live distributions, so that a smaller one
can be chosen.

At one position let p be the teacher, q the student, K the head that the capture keeps, p_T and q_T the masses outside
it.
- KL lost: KL(p || q) minus the KL on head and tail bucket = sum outside K of p log(p / q) - p_T log(p_T / q_T) >= 0. So
  the cached KL is a lower bound of the full one, and 0 for k = V. With draws the training loss is unbiased, and what is
  lost is only a constant: none shown.
- The dense gradient with respect to the student's logits is q - p. The capture's is q - p^, where p^ is p on the head
  and outside it the student's own tail shape, p_T q / q_T; with m draws it is p_T count / m at the drawn tokens
  instead. Gradient error: sum over positions of |p^ - p|_2 over the sum of |q - p|_2. Error of the mean gradient: |mean
  (p^ - p)|_2 over |mean (q - p)|_2, in which unbiased draws average out and a systematic error stays. It needs a
  student: mean (q - p) is zero where q is the mean of p.
- Bytes per position: the sampled rows captured so and encoded by the codec.
q is a given student's, or, without one, the mean of the teacher's distributions over the sampled positions: a student
that knows how often tokens come and nothing else, which completes tails worse than any trained one.

Cost: a forward pass per row (and student), and per capture and temperature some passes over [C, V] in float64.
Shape letters: C positions of a chunk, V entries, K head entries, m draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shared.cache.cache import Cache
from shared.payload.codec import Codec
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.transformers.transformers_model import CausalModel
from tools.audit.capturing import Columns, capture_chunk, join_columns
from tools.audit.live import chunk_positions, dense_logprobs

HYBRIDS = ((8, 4),)
"""Captures of the top k with m draws in the grid."""


@dataclass(slots=True)
class Losses:
    """Sums of one capture at one temperature."""

    kl_lost: float = 0.0
    error: float = 0.0
    dense: float = 0.0
    mean_error: torch.Tensor | None = None
    mean_dense: torch.Tensor | None = None

    def add(self, kl_lost: torch.Tensor, wrong: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add KL lost [C], p^ - p [C, V] and q - p [C, V]."""
        self.kl_lost += float(kl_lost.sum())
        self.error += float(wrong.norm(dim=-1).sum())
        self.dense += float(gradient.norm(dim=-1).sum())
        self.mean_error = wrong.sum(0) + (0 if self.mean_error is None else self.mean_error)
        self.mean_dense = gradient.sum(0) + (0 if self.mean_dense is None else self.mean_dense)


@dataclass(slots=True)
class Candidate:
    """One capture under audit."""

    layout: ColumnLayout
    own: bool
    """It is the layer's."""
    losses: dict[float, Losses] = field(default_factory=dict)
    num_bytes: int = 0
    entries: int = 0
    columns: list[Columns] = field(default_factory=list)
    """Of the row at hand."""


def candidates_of(
    cache: Cache,
    ks: Sequence[int],
    masses: Sequence[float],
    temperatures: Sequence[float],
) -> list[Candidate]:
    """Return the layer's own capture and a grid of others, each once."""
    identity = cache.layer
    assert identity is not None
    vocab = identity.vocab_size
    own = replace(ColumnLayout.of(identity, vocab), temperatures=tuple(temperatures))
    grid = [ColumnLayout(min(k, vocab), tuple(temperatures), 0, mass, vocab) for k in ks for mass in masses]
    grid += [ColumnLayout(min(k, vocab), tuple(temperatures), draws, 1.0, vocab) for k, draws in HYBRIDS]
    return [Candidate(layout, layout == own) for layout in dict.fromkeys([own, *grid])]


def audit_truncation(
    cache: Cache,
    model: CausalModel,
    chosen: Sequence[int],
    candidates: Sequence[Candidate],
    student: CausalModel | None,
) -> list[dict[str, Any]]:
    """Return one document per capture and temperature.

    Returns:
        k, draws, mass, temperature, kl_lost (nats per position; None with draws), gradient_error, mean_gradient_error
        (None without a student), bytes_per_position, mean_entries, own (it is the layer's).
    """
    identity = cache.layer
    assert identity is not None
    vocab, rows = identity.vocab_size, [cache[index] for index in chosen]
    mean = None if student is not None else _mean_logprobs(cache, model, chosen, vocab)
    step = chunk_positions(*(one for one in (model, student) if one is not None))
    positions = 0
    for row in rows:
        of_student = None if student is None else dense_logprobs(student, row, vocab_size=vocab, step=step)
        for where, logprobs in dense_logprobs(model, row, vocab_size=vocab, step=step):
            positions += len(logprobs)
            log_q = next(of_student)[1] if of_student is not None else mean
            assert log_q is not None
            for candidate in candidates:
                columns = capture_chunk(logprobs, row, where, candidate.layout)
                candidate.columns.append(columns)
                for temperature in candidate.layout.temperatures:
                    losses = candidate.losses.setdefault(temperature, Losses())
                    losses.add(*_lost(logprobs, log_q, columns[0], candidate.layout, temperature))
        for candidate in candidates:
            targets = join_columns(candidate.columns, candidate.layout)
            layout = candidate.layout
            most = layout.num_head + layout.has_label
            codec = Codec(identity.gap_step, layout.temperatures, layout.num_draws, vocab, most)
            candidate.num_bytes += len(codec.encode(targets))
            candidate.entries += len(targets.ids)
            candidate.columns.clear()
    return [
        _document(candidate, at, losses, positions, has_student=student is not None)
        for candidate in candidates
        for at, losses in candidate.losses.items()
    ]


def _lost(
    log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor, layout: ColumnLayout, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL lost [C], p^ - p [C, V] and q - p [C, V] of captured columns, at one temperature."""
    log_p, log_q = _at(log_p, temperature), _at(log_q, temperature).expand_as(log_p)
    p, q = log_p.exp(), log_q.exp()
    head = ids[:, 1 : layout.tail_start]
    inside = torch.zeros((len(p), p.shape[1] + 1), dtype=torch.bool)
    inside.scatter_(1, head.where(head >= 0, p.shape[1]), True)
    inside = inside[:, :-1]
    tail_p, tail_q = p.masked_fill(inside, 0.0), q.masked_fill(inside, 0.0)
    mass_p, mass_q = tail_p.sum(-1, keepdim=True), tail_q.sum(-1, keepdim=True)
    ratio = torch.where(mass_q > 0, mass_p / mass_q, 0.0)
    outside = torch.where(tail_p > 0, tail_p * (log_p - log_q), 0.0).sum(-1)
    bucket = torch.where((mass_p > 0) & (mass_q > 0), mass_p * (mass_p / mass_q).log(), 0.0)[:, 0]
    if layout.num_draws:
        first = layout.draw_start + layout.temperatures.index(temperature) * layout.num_draws
        drawn = ids[:, first : first + layout.num_draws]
        rebuilt = torch.zeros_like(p)
        share = mass_p.expand(drawn.shape) / layout.num_draws
        rebuilt.scatter_add_(1, drawn.clamp(min=0), share.where(drawn >= 0, 0.0))
    else:
        rebuilt = tail_q * ratio
    return (outside - bucket).clamp(min=0.0), rebuilt - tail_p, q - p


def _at(logprobs: torch.Tensor, temperature: float) -> torch.Tensor:
    return logprobs if temperature == 1.0 else (logprobs / temperature).log_softmax(-1)


def _mean_logprobs(cache: Cache, model: CausalModel, chosen: Sequence[int], vocab: int) -> torch.Tensor:
    total, positions = torch.zeros(vocab, dtype=torch.float64), 0
    for index in chosen:
        for _, logprobs in dense_logprobs(model, cache.sequence(index), vocab_size=vocab):
            total += logprobs.exp().sum(0)
            positions += len(logprobs)
    return (total / positions).clamp(min=1e-12).log().log_softmax(-1)[None]


def _document(
    candidate: Candidate, temperature: float, losses: Losses, positions: int, *, has_student: bool
) -> dict[str, Any]:
    layout = candidate.layout
    assert losses.mean_error is not None
    assert losses.mean_dense is not None
    mean_dense = float(losses.mean_dense.norm())
    of_mean = float(losses.mean_error.norm()) / mean_dense if mean_dense else 0.0
    return {
        "k": layout.num_head,
        "draws": layout.num_draws,
        "mass": layout.mass,
        "temperature": temperature,
        "kl_lost": None if layout.num_draws else losses.kl_lost / positions,
        "gradient_error": losses.error / losses.dense if losses.dense else 0.0,
        "mean_gradient_error": of_mean if has_student else None,
        "bytes_per_position": candidate.num_bytes / positions,
        "mean_entries": candidate.entries / positions,
        "own": candidate.own,
    }


def smaller_capture(documents: Sequence[dict[str, Any]]) -> str | None:
    """Name the smallest capture whose mean gradient is no more wrong than the layer's own; None where there is none,
    or where no student told.
    """
    by_capture: dict[tuple[int, int, float], list[dict[str, Any]]] = defaultdict(list)
    for document in documents:
        by_capture[document["k"], document["draws"], document["mass"]].append(document)
    own = next(group for group in by_capture.values() if group[0]["own"])
    if any(one["mean_gradient_error"] is None for one in own):
        return None
    size = own[0]["bytes_per_position"]
    fitting = [
        (group[0]["bytes_per_position"], capture)
        for capture, group in by_capture.items()
        if all(one["mean_gradient_error"] <= at["mean_gradient_error"] for one, at in zip(group, own, strict=True))
    ]
    smallest, (k, draws, mass) = min(fitting)
    if smallest >= size:
        return None
    return (
        f"k {k}, {draws} draws, mass {mass:g}: no larger error of the mean gradient than the layer's own capture, "
        f"{smallest:.1f} bytes per position instead of {size:.1f}"
    )

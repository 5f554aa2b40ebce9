"""The losses over the whole vocabulary in float64 autograd: what the fused operator must agree with, in the obvious
way.

A case starts from dense teacher logits, so masses at every temperature are known without the operator's formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.batch.target_batch import TargetBatch
from student_train.losses import LossTerm

SHAPES = ("fixed", "ragged", "whole", "hybrid", "sample")
TEMPERATURES = (1.0, 2.0)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_logits: Tensor
    supports: list[list[int]]
    """Token ids of each position's head."""
    multiplicities: list[Tensor] | None
    """Per temperature [S, V]: how often a token was drawn."""
    batch: dict[str, Tensor]

    @property
    def targets(self) -> TargetBatch:
        return TargetBatch.from_batch(self.batch)


def make_case(
    shape: str, *, seed: int = 0, positions: int = 9, width: int = 6, vocab: int = 23, teacher: Tensor | None = None
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(positions, width), normal(vocab, width)
    teacher_logits = 2.0 * normal(positions, vocab) if teacher is None else teacher
    if shape == "self":  # the teacher is the student
        shape, teacher_logits = "fixed", hidden @ weight.t()
    labels = torch.randint(0, vocab, (positions,), generator=generator)
    counts = {
        "fixed": [4] * positions,
        "ragged": [(3 * s) % 7 for s in range(positions)],
        "whole": [vocab] * positions,
        "hybrid": [3] * positions,
        "sample": [0] * positions,
    }[shape]
    order = teacher_logits.argsort(dim=1, descending=True)
    supports = [order[s, :n].tolist() for s, n in enumerate(counts)]
    logprobs = teacher_logits.log_softmax(1)
    batch = {
        "support_counts": torch.tensor(counts, dtype=torch.int32),
        "support_ids": torch.cat([order[s, :n] for s, n in enumerate(counts)]),
        "support_logprobs": torch.cat([logprobs[s, order[s, :n]] for s, n in enumerate(counts)]),
        "tail_logmass": torch.stack([tail_masses(teacher_logits / t, supports).log() for t in TEMPERATURES], dim=1),
        "temperatures": torch.tensor(TEMPERATURES, dtype=torch.float64),
    }
    multiplicities = None
    if shape in ("hybrid", "sample"):
        multiplicities = [draw_tail(teacher_logits / t, supports, 5, generator) for t in TEMPERATURES]
        drawn = [m.nonzero() for m in multiplicities]
        batch["draw_counts"] = torch.stack([(m > 0).sum(1) for m in multiplicities])
        batch["draw_ids"] = torch.cat([where[:, 1] for where in drawn])
        batch["draw_multiplicities"] = torch.cat([m[m > 0] for m in multiplicities]).to(torch.int32)
    return Case(hidden, weight, labels, teacher_logits, supports, multiplicities, batch)


def outside(supports: list[list[int]], vocab: int) -> Tensor:
    mask = torch.ones(len(supports), vocab, dtype=torch.bool)
    for s, ids in enumerate(supports):
        mask[s, ids] = False
    return mask


def tail_masses(logits: Tensor, supports: list[list[int]]) -> Tensor:
    return (logits.softmax(1) * outside(supports, logits.shape[1])).sum(1)


def draw_tail(logits: Tensor, supports: list[list[int]], num_draws: int, generator: torch.Generator) -> Tensor:
    weights = logits.softmax(1) * outside(supports, logits.shape[1])
    drawn = torch.multinomial(weights, num_draws, replacement=True, generator=generator)
    return torch.zeros_like(logits).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=logits.dtype))


DRAWN = ("forward_kl", "tail_weighted_kl")
"""Divergences that see drawn tokens."""


def divergence_of_masses(
    name: str, p: Tensor, q: Tensor, options: dict[str, float], num_head: int | None = None
) -> Tensor:
    """The definition on probabilities [M] of one position, the first `num_head` (default: all but the last) of the
    head; a mass of 0 counts for nothing.
    """
    head = slice(0, len(p) - 1 if num_head is None else num_head)
    tail = slice(head.stop, None)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        there = a > 0
        return (a[there] * (a[there] / b[there]).log()).sum()

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "head_kl":
        return kl(p[:-1] / p[:-1].sum(), q[:-1] / q[:-1].sum())
    if name == "jsd":
        beta = options.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "tail_weighted_kl":
        coarse = [torch.cat([x[head], x[tail].sum()[None]]) for x in (p, q)]
        inner = kl(p[tail] / p[tail].sum(), q[tail] / q[tail].sum()) * p[tail].sum() if p[tail].sum() > 0 else 0.0
        return kl(*coarse) + options.get("tail_weight", 2.0) * inner
    if name == "decoupled_kl":
        t = options.get("head_temperature", 2.0)
        halves = [torch.stack([x[head].sum(), x[tail].sum()]) for x in (p, q)]
        within = kl(*(x[head] ** (1 / t) / (x[head] ** (1 / t)).sum() for x in (p, q))) if len(p[head]) else 0.0
        return kl(*halves) + p[head].sum() * t**2 * within
    skew = options.get("skew", 0.1)
    if name == "skew_forward_kl":
        return kl(p, skew * p + (1 - skew) * q)
    if name == "skew_reverse_kl":
        return kl(q, skew * q + (1 - skew) * p)
    raise KeyError(f"{name} has no definition here")


def dense_loss(case: Case, student_logits: Tensor, terms: list[LossTerm], num_positions: float) -> Tensor:
    """The weighted sum in nats per position, differentiable in `student_logits` [S, V]."""
    total = student_logits.new_zeros(())
    for term in terms:
        for s in range(len(case.labels)):
            if term.name == "cross_entropy":
                total = total - term.weight * student_logits[s].log_softmax(0)[case.labels[s]]
                continue
            p, q = masses(case, student_logits, s, term)
            num_head = len(case.supports[s])
            value = divergence_of_masses(term.name, p, q, dict(term.options), num_head)
            if term.by_entropy:
                coarse = torch.cat([p[:num_head], p[num_head:].sum()[None]])
                value = value * -(coarse * coarse.log())[coarse > 0].sum()
            total = total + term.weight * term.temperature**2 * value
    return total / num_positions


def masses(case: Case, student_logits: Tensor, s: int, term: LossTerm) -> tuple[Tensor, Tensor]:
    """Teacher and student masses at position s: members, then the bucket of all other tokens."""
    teacher = (case.teacher_logits[s] / term.temperature).softmax(0)
    student = (student_logits[s] / term.temperature).softmax(0)
    head = case.supports[s]
    rest = outside([head], len(teacher))[0]
    if case.multiplicities is not None and term.name in DRAWN:
        drawn = case.multiplicities[TEMPERATURES.index(term.temperature)][s]
        where = drawn > 0
        weights = teacher[rest].sum() * drawn[where] / drawn.sum()
        not_drawn = student[rest].sum() - student[where].sum()
        empty = weights.new_zeros(1)
        return torch.cat([teacher[head], weights, empty]), torch.cat([student[head], student[where], not_drawn[None]])
    if not rest.any() and term.name != "head_kl":
        return teacher[head], student[head]
    return torch.cat([teacher[head], teacher[rest].sum()[None]]), torch.cat([student[head], student[rest].sum()[None]])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())

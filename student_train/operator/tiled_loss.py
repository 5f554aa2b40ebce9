"""The fused loss by tiles of the vocabulary instead of chunks of positions: no buffer [chunk, vocabulary], for GPUs
with Triton.

First pass over the tiles: logits of all positions and one tile; the members' and the label's are read out, the rest
goes into an online log-sum-exp per temperature. Then the same masses, divergences and slopes as in softmax_group.py.
Second pass: the tile's logits again, turned into their gradient, and through the head; a row of the head belongs to one
tile, so its gradient is written once. Against the chunks: a matrix product more (the logits twice), and three passes
over the logits fewer. Buffers: [S, tile], one, or two where terms have several temperatures; tiles are as wide as the
budget allows; a teacher of some positions works on a copy of their rows.

Shape letters: S positions, K members, V vocabulary, W width of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.batch.target_batch import Members
from student_train.operator.head_chunks import CHUNK_BYTES, Head, HeadGradients
from student_train.operator.loss_terms import TermGroup
from student_train.operator.softmax_group import finite, mass_gradients

MIN_TILE = 512
"""Narrower tiles starve the matrix products, so the budget gives way."""


@dataclass(slots=True, eq=False)
class _Group:
    """What one temperature's terms know of all positions."""

    terms: TermGroup
    members: Members | None
    ids: Tensor
    """[S, K] members, V in padded slots."""
    at_members: Tensor
    """[S, K] their plain logits, -inf until their tile was seen and in padded slots."""
    row_max: Tensor
    row_sum: Tensor
    """[S] running log-sum-exp of the rest at the temperature, in two parts."""
    log_rest: Tensor
    coefficient: Tensor
    """[S] of the second pass."""
    gradient: Tensor
    """[S, K] by the members' logits."""
    label_weight: Tensor | float | None = None


def run_tiles(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    groups: Sequence[TermGroup],
    values: Tensor,
    gradients: HeadGradients,
    budget_bytes: int | None,
    *,
    want: bool,
) -> None:
    """Add each term's sum over the positions to `values` [terms] and, where asked for, fill `gradients`."""
    states = [_start(head, labels, group) for group in groups]
    label_logits = torch.full((len(labels), 1), -torch.inf, dtype=head.dtype, device=hidden.device)
    inputs = head.input_of(hidden)
    width = _tile_width(head, len(hidden), _num_buffers(states), budget_bytes)
    for first, tile_head, logits, _ in _tiles(head, inputs, width, with_slope=False):
        from student_train.operator.triton_kernels import add_to_logsumexp

        place = _places(labels[:, None], first, tile_head)
        label_logits = torch.maximum(label_logits, logits.gather(1, place))
        for state in states:
            rows = _rows_of(state, logits)
            plain, place = _without_members(state, rows, first, tile_head)
            state.at_members = torch.maximum(state.at_members, plain)
            add_to_logsumexp(rows, state.terms.temperature, state.row_max, state.row_sum)
            rows.scatter_(1, place, plain)
    for state in states:
        _finish(state, label_logits, values, want_gradient=want)
    if want:
        _second_pass(head, hidden, inputs, labels, states, gradients, width)


def _num_buffers(states: Sequence[_Group]) -> int:
    """Return how many buffers of a tile the groups take: their gradient, and the rows of those of some positions."""
    some = any(state.terms.positions is not None for state in states)
    return 1 + (len(states) != 1 or some) + some


def _rows_of(state: _Group, tile: Tensor) -> Tensor:
    """Return the tile's rows that a group is about: all of them as they lie, or a copy of some."""
    positions = state.terms.positions
    return tile if positions is None else tile.index_select(0, positions)


def _start(head: Head, labels: Tensor, group: TermGroup) -> _Group:
    """Return a group's state before any tile was seen."""
    members, targets = None, group.targets
    labels = labels if group.positions is None else labels[group.positions]
    if targets is not None and group.needs_members:
        everything = slice(0, len(labels))
        members = targets.members(
            everything, group.temperature, head.vocab_size, head.dtype, with_draws=group.with_draws
        )
    ids = labels.new_empty(len(labels), 0) if members is None else members.ids
    nothing = torch.full(ids.shape, -torch.inf, dtype=head.dtype, device=ids.device)
    row = torch.zeros(len(labels), dtype=head.dtype, device=ids.device)
    return _Group(group, members, ids, nothing, row - torch.inf, row, row, row, nothing)


def _tile_width(head: Head, num_positions: int, num_buffers: int, budget_bytes: int | None) -> int:
    """Return how many rows of the head a tile has."""
    num_buffers += head.softcap is not None
    by_budget = (budget_bytes or CHUNK_BYTES) // (max(num_positions, 1) * head.dtype.itemsize * num_buffers)
    width: int = max(by_budget // 16 * 16, MIN_TILE)
    return width


def _tiles(
    head: Head, inputs: Tensor, width: int, *, with_slope: bool
) -> Iterator[tuple[int, Head, Tensor, Tensor | None]]:
    """Yield the first token of each tile, its part of the head, its plain logits [S, W], and their slope under a soft
    cap.

    Buffers are reused, and end in columns that read as -inf.
    """
    width = min(width, head.vocab_size)
    whole = head.part(0, width)
    buffer, slope = (
        whole.buffer(len(inputs)),
        whole.buffer(len(inputs)) if with_slope and head.softcap is not None else None,
    )
    for first in range(0, head.vocab_size, width):
        part = head.part(first, min(first + width, head.vocab_size))
        part_slope = None if slope is None else slope[:, : part.buffer_width]
        logits = buffer[:, : part.buffer_width]
        part.logits_into(logits, inputs, part_slope)
        yield first, part, logits, part_slope


def _places(ids: Tensor, first: int, tile_head: Head) -> Tensor:
    """Return the columns of a tile where `ids` are; one that reads as -inf for those of other tiles."""
    place = ids - first
    return place.masked_fill((place < 0) | (place >= tile_head.vocab_size), tile_head.vocab_size)


def _without_members(state: _Group, logits: Tensor, first: int, tile_head: Head) -> tuple[Tensor, Tensor]:
    """Put -inf at a tile's members; return their logits and places."""
    place = _places(state.ids, first, tile_head)
    plain = logits.gather(1, place)
    logits.scatter_(1, place, -torch.inf)
    return plain, place


def _finish(state: _Group, label_logits: Tensor, values: Tensor, *, want_gradient: bool) -> None:
    """Turn a group's masses into values and into what the second pass needs."""
    temperature = state.terms.temperature
    label_logits = label_logits if state.terms.positions is None else label_logits[state.terms.positions]
    rest = (state.row_max + state.row_sum.log())[:, None]
    unnormalised = torch.cat([state.at_members / temperature, rest], dim=1)
    log_total = torch.logsumexp(unnormalised, dim=1, keepdim=True)
    log_q, label_logprobs = finite(unnormalised - log_total), label_logits / temperature - log_total
    gradient, state.label_weight = mass_gradients(
        log_q, label_logprobs, state.members, state.terms.terms, temperature, values, want_gradient=want_gradient
    )
    state.gradient, state.coefficient = gradient[:, :-1], gradient[:, -1].contiguous()
    state.log_rest = rest[:, 0].masked_fill(rest[:, 0] == -torch.inf, 0.0)


def _second_pass(
    head: Head,
    hidden: Tensor,
    inputs: Tensor,
    labels: Tensor,
    states: Sequence[_Group],
    gradients: HeadGradients,
    width: int,
) -> None:
    """Fill the gradients of hidden states, weight and bias, tile by tile."""
    from student_train.operator.triton_kernels import write_rest_gradient

    of_hidden = None if gradients.hidden is None else torch.empty_like(gradients.hidden)
    every = slice(0, len(hidden))
    for first, part, logits, slope in _tiles(head, inputs, width, with_slope=True):
        total = logits if _num_buffers(states) == 1 else torch.zeros_like(logits)
        for state in states:
            rows = _rows_of(state, logits)
            into = total if state.terms.positions is None else rows
            plain, place = _without_members(state, rows, first, part)
            adds = into is not rows
            write_rest_gradient(rows, into, state.terms.temperature, state.log_rest, state.coefficient, add=adds)
            into.scatter_add_(1, place, state.gradient.masked_fill(place == part.vocab_size, 0.0))
            if state.label_weight is not None:
                at_label = _places(labels[:, None], first, part)
                weight = torch.as_tensor(state.label_weight, dtype=total.dtype, device=total.device)
                into.scatter_add_(1, at_label, -weight.expand(at_label.shape))
            if state.terms.positions is not None:
                total.index_add_(0, state.terms.positions, rows)
            elif adds:
                logits.scatter_(1, place, plain)
        if slope is not None:
            total[:, : part.vocab_size].mul_(slope[:, : part.vocab_size])
        rows = slice(first, first + part.vocab_size)
        views = [None if x is None else x[rows] for x in (gradients.weight, gradients.bias)]
        HeadGradients(of_hidden, *views).add(part, every, inputs, total)
        if gradients.hidden is not None:
            gradients.hidden.add_(of_hidden)

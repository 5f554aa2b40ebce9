"""The student's attention, averaged over heads, at the keys that the cache stored, with gradients; row by row of a
pack.

softmax(q k) is computed again from the queries and keys of a layer, for supervised queries only and only over their own
row, in float32; the mass of all other keys is summed from what is left, not taken as 1 minus the stored ones, so
nothing cancels. Scores are recomputed in the backward pass instead of kept.
Cost: A S L scores per row of L tokens, twice; memory: one chunk of them.

Shape letters: B tokens of the packs, S supervised positions, C of them in a chunk, L tokens of a row, A heads, G
key-value heads, D head width, M stored keys of the longest query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from student_train.layers.student_watch import AttentionInputs

SCORES_AT_ONCE = 2**25
"""Attention scores that are alive at once where they are computed here, in blocks."""


def stored_masses(
    inputs: AttentionInputs, predictor_index: Tensor, position_ids: Tensor, distances: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the student's masses [S, M] of the stored keys and [S] of all others.

    Args:
        inputs: what the layer attends with.
        predictor_index: [S] int64 index in the pack of each query, ascending.
        position_ids: [B] int64, from 0 in each row.
        distances: [S, M] int64 query minus key, -1 in padded slots, whose mass is 0.
    """
    masses, rests = [], []
    for start, where in _row_chunks(predictor_index, position_ids, inputs.query.shape[0]):
        queries = predictor_index[where] - start
        end = int(queries[-1]) + 1
        query = inputs.query.index_select(1, predictor_index[where])
        arguments = (query, inputs.key[:, start : start + end], queries, distances[where], inputs)
        if torch.is_grad_enabled():
            mass, rest = checkpoint(_masses, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            mass, rest = _masses(*arguments)
        masses.append(mass)
        rests.append(rest)
    if not masses:
        nothing = inputs.query.float().sum() * 0.0 + inputs.key.float().sum() * 0.0
        return nothing + torch.zeros_like(distances, dtype=torch.float32), nothing + distances.new_zeros(
            0, dtype=torch.float32
        )
    return torch.cat(masses), torch.cat(rests)


def _masses(
    query: Tensor, key: Tensor, queries: Tensor, distances: Tensor, inputs: AttentionInputs
) -> tuple[Tensor, Tensor]:
    """Return masses [C, M] and [C] of queries [A, C, D] over keys [G, L, D] of their row; `queries` [C] are their
    places in it.
    """
    num_keys = key.shape[1]
    averaged = averaged_attention(query, key, queries, inputs)
    padded = torch.nn.functional.pad(averaged, (0, 1))  # a padded slot points at the column beyond, which is 0
    keys = torch.where(distances < 0, num_keys, queries[:, None] - distances)
    return padded.gather(1, keys), padded.scatter(1, keys, 0.0).sum(-1)


def averaged_attention(query: Tensor, key: Tensor, queries: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return [C, L] float32 attention averaged over heads; arguments as for `_masses`."""
    num_heads, num_queries, width = query.shape
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(key.shape[0], -1, num_queries, width)
        scores = torch.einsum("gacd,gld->gacl", grouped, key.float()) * inputs.scaling
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        distance = queries[:, None] - torch.arange(key.shape[1], device=queries.device)
        hidden = (distance < 0) if inputs.window is None else (distance < 0) | (distance >= inputs.window)
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return probabilities.view(num_heads, num_queries, -1).mean(0)


def _row_chunks(predictor_index: Tensor, position_ids: Tensor, num_heads: int) -> Iterator[tuple[int, slice]]:
    """Yield the start of a row in the pack and which supervised positions are its next chunk; reads the rows back to
    the host.
    """
    if not len(predictor_index):
        return
    starts = predictor_index - position_ids[predictor_index]
    rows, counts = torch.unique_consecutive(starts, return_counts=True)
    last = (predictor_index + 1 - starts)[counts.cumsum(0) - 1]
    first = 0
    for start, count, length in zip(rows.tolist(), counts.tolist(), last.tolist(), strict=True):
        step = max(1, SCORES_AT_ONCE // (num_heads * length))
        for begin in range(first, first + count, step):
            yield start, slice(begin, min(begin + step, first + count))
        first += count

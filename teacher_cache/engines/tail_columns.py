"""Head, tails and draws of full-width rows, as columns; runs where the full rows are: in vLLM's worker or beside transformers.

Per chunk of rows, temperatures from the highest down: e = exp(s / T) once, and e^2 where the next T is half of it; the head is
cut where it covers `mass` at the highest T; its entries are zeroed in e; what remains is the tail, exactly, however small; draws
are inverse-CDF look-ups in it.
Cost: one exp or square and one sum per row and temperature, one float64 cumulative sum more with draws; at most
`CHUNK_ENTRIES` x (4 + 8 with draws) bytes of scratch, times two.

Shape letters: P positions, V entries of the model's head (padding included), K head entries, J temperatures, m draws.
"""

from __future__ import annotations

import math

import torch

from teacher_cache.engines.column_layout import NOTHING, ColumnLayout
from teacher_cache.engines.draw_keys import uniforms

CHUNK_ENTRIES = 2**24
"""Entries of rows x V worked on at once: 64 MiB in float32."""


def order_head(ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order [P, K] head entries by descending log-probability, ties by ascending id."""
    ids, order = ids.sort(dim=-1)
    logprobs, order = logprobs.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), logprobs


def extend_columns(
    scores: torch.Tensor,
    label_ids: torch.Tensor,
    label_logprobs: torch.Tensor,
    head_ids: torch.Tensor,
    head_logprobs: torch.Tensor,
    keys: torch.Tensor,
    layout: ColumnLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [P, 1 + layout.num_extra] ids (int64) and values (type of `head_logprobs`) of scored rows.

    Args:
        scores: [P, V] logits or log-probabilities at temperature 1, any float type; left unchanged.
        label_ids: [P] int64 tokens that follow.
        label_logprobs: [P] their natural logs.
        head_ids: [P, K] int64 most probable entries.
        head_logprobs: [P, K] their natural logs.
        keys: [P] int64 draw keys (unused without draws).
        layout: what to keep.
    """
    num_rows, device = len(scores), scores.device
    head_ids, head_logprobs = order_head(head_ids.to(torch.int64), head_logprobs)
    sentinels = torch.tensor(list(layout.sentinels), device=device, dtype=torch.int64)
    ids = torch.full((num_rows, 1 + layout.num_extra), NOTHING, dtype=torch.int64, device=device)
    values = torch.zeros(ids.shape, dtype=head_logprobs.dtype, device=device)
    ids[:, 0], values[:, 0] = label_ids, label_logprobs
    ids[:, layout.tail_start : layout.draw_start] = sentinels
    rows = max(1, CHUNK_ENTRIES // scores.shape[1])
    for start in range(0, num_rows, rows):
        chunk = slice(start, start + rows)
        keep, tails, draws = _chunk(scores[chunk], head_ids[chunk], keys[chunk], layout)
        ids[chunk, 1 : layout.tail_start] = head_ids[chunk].where(keep, NOTHING)
        values[chunk, 1 : layout.tail_start] = head_logprobs[chunk].where(keep, -torch.inf)
        values[chunk, layout.tail_start : layout.draw_start] = tails.to(values.dtype)
        ids[chunk, layout.draw_start :] = draws
    return ids, values


def _chunk(
    scores: torch.Tensor, head_ids: torch.Tensor, keys: torch.Tensor, layout: ColumnLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return of one chunk: which head entries stay [P, K], log tail masses [P, J], drawn ids [P, J m]."""
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    shifted = scores.to(compute_dtype)
    shifted = shifted - shifted.amax(-1, keepdim=True)
    keep = head_ids < layout.vocab_size
    tails, draws = [], []
    masses: torch.Tensor | None = None
    above = math.nan
    for temperature in reversed(layout.temperatures):
        halved = masses is not None and above == 2 * temperature
        masses = masses.mul_(masses) if masses is not None and halved else torch.exp(shifted / temperature)
        above = temperature
        head = torch.exp(shifted.gather(1, head_ids) / temperature)
        if temperature == layout.temperatures[-1]:
            keep &= _covering(head, masses.sum(-1), layout.mass)
        masses.scatter_(1, head_ids, head.where(~keep, 0.0))
        tail = masses.sum(-1)
        tails.append(tail.log() - (tail + head.where(keep, 0.0).sum(-1)).log())
        if layout.num_draws:
            draws.append(_draw(masses[:, : layout.vocab_size], uniforms(keys, temperature, layout.num_draws)))
    drawn = torch.cat(draws[::-1], 1) if draws else head_ids.new_empty((len(scores), 0))
    return keep, torch.stack(tails[::-1], 1).clamp(max=0.0), drawn


def _covering(head: torch.Tensor, total: torch.Tensor, mass: float) -> torch.Tensor:
    """Mark the shortest prefix of [P, K] unnormalised head masses that covers `mass` of [P] totals (all of it where none does)."""
    if mass >= 1.0:
        return torch.ones_like(head, dtype=torch.bool)
    share = head.double() / total.double()[:, None]
    return share.cumsum(-1) - share < mass


def _draw(masses: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return [P, m] ids drawn from [P, V] unnormalised masses by [P, m] numbers in [0, 1); -1 where all masses are 0."""
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    wanted = torch.minimum(unit * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=masses.shape[1] - 1)
    # A parallel cumulative sum may be off by a rounding and end on an entry without mass: take the heaviest instead.
    drawn = drawn.where(masses.gather(1, drawn) > 0, masses.argmax(-1, keepdim=True))
    return drawn.where(total > 0, NOTHING)

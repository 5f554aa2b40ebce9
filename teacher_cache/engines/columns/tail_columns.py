"""Head, tails and draws of full-width rows, as columns; runs where the full rows are: in vLLM's worker or beside
transformers.

Per chunk of rows, temperatures from the highest down: e = exp(s / T) once, and e^2 where the next T is half of it; the
head is cut where it covers `mass` at the highest T; its entries are zeroed in e; what remains is the tail, exactly,
however small; draws are inverse-CDF look-ups in it, over sums of blocks and then within one block, so that no
cumulative sum spans the vocabulary.
Cost: one exp or square and one sum per row and temperature; draws add m blocks each. Scratch: twice `CHUNK_ENTRIES`
    numbers.

Shape letters: P positions, V entries of the model's head (padding included), K head entries, J temperatures, m draws.
"""

from __future__ import annotations

import math

import torch

from teacher_cache.engines.columns.column_layout import CHUNK_ENTRIES, NOTHING, ColumnLayout
from teacher_cache.engines.columns.draw_keys import uniforms


def chunk_rows(num_entries: int, device: torch.device) -> int:
    """Return how many rows of this many entries are worked on at once."""
    return max(1, CHUNK_ENTRIES["cpu" if device.type == "cpu" else "cuda"] // num_entries)


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
    if layout.has_label:  # after the entries that it is not among, none of which is less probable
        head_ids = torch.cat([head_ids, label_ids[:, None].to(torch.int64)], 1)
        head_logprobs = torch.cat([head_logprobs, label_logprobs[:, None].to(head_logprobs.dtype)], 1)
    sentinels = torch.tensor(list(layout.sentinels), device=device, dtype=torch.int64)
    ids = torch.full((num_rows, 1 + layout.num_extra), NOTHING, dtype=torch.int64, device=device)
    values = torch.zeros(ids.shape, dtype=head_logprobs.dtype, device=device)
    ids[:, 0], values[:, 0] = label_ids, label_logprobs
    ids[:, layout.tail_start : layout.draw_start] = sentinels
    rows = chunk_rows(scores.shape[1], device)
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
    """Return of one chunk: which head entries stay [P, K], log tail masses [P, J], drawn ids [P, J m].

    With the label in the head, its column is the last of K + 1, and stays where it is none of the others that do.
    """
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    shifted = scores.to(compute_dtype) - scores.amax(-1, keepdim=True)
    head_shifted = shifted.gather(1, head_ids)
    keep = head_ids < layout.vocab_size
    gone = keep
    tails, draws = [], []
    masses, above = shifted, math.nan
    block = 2 ** max(4, math.isqrt(layout.vocab_size).bit_length() - 1)
    for temperature in reversed(layout.temperatures):
        if above == 2 * temperature:
            masses.mul_(masses)
        else:
            masses = torch.exp(shifted) if temperature == 1.0 else shifted.div(temperature).exp_()
        above = temperature
        head = torch.exp(head_shifted / temperature)
        if temperature == layout.temperatures[-1] and layout.mass < 1.0:
            keep[:, : layout.num_head] &= _covering(head[:, : layout.num_head], masses.sum(-1), layout.mass)
        if layout.has_label and temperature == layout.temperatures[-1]:
            is_label = head_ids == head_ids[:, -1:]
            keep[:, -1] &= ~(is_label & keep)[:, :-1].any(-1)
            gone = keep | (is_label & (head_ids < layout.vocab_size))
        masses.scatter_(1, head_ids, head.where(~gone, 0.0))
        blocks = block_sums(masses[:, : layout.vocab_size], block)
        tail = blocks.sum(-1) + masses[:, layout.vocab_size :].sum(-1)
        # log(tail / (tail + head)) without the difference of two logarithms, which cancels where the tail is near 1
        tails.append(-torch.log1p(head.where(keep, 0.0).sum(-1) / tail))
        if layout.num_draws:
            unit = uniforms(keys, temperature, layout.num_draws)
            draws.append(_draw(masses[:, : layout.vocab_size], blocks, block, unit))
    drawn = torch.cat(draws[::-1], 1) if draws else head_ids.new_empty((len(scores), 0))
    return keep, torch.stack(tails[::-1], 1).clamp(max=0.0), drawn


def block_sums(masses: torch.Tensor, block: int) -> torch.Tensor:
    """Return [P, ceil(V / block)] sums of [P, V] masses over blocks of columns, the last one shorter where V is no
    multiple.
    """
    whole = masses.shape[1] // block * block
    sums = masses[:, :whole].unflatten(1, (-1, block)).sum(-1)
    return torch.cat([sums, masses[:, whole:].sum(-1, keepdim=True)], 1) if whole < masses.shape[1] else sums


def _covering(head: torch.Tensor, total: torch.Tensor, mass: float) -> torch.Tensor:
    """Mark the shortest prefix of [P, K] unnormalised head masses that covers `mass` of [P] totals (all of it where
    none does).
    """
    share = head.double() / total.double()[:, None]
    return share.cumsum(-1) - share < mass


def _draw(masses: torch.Tensor, blocks: torch.Tensor, block: int, unit: torch.Tensor) -> torch.Tensor:
    """Return [P, m] ids drawn from [P, V] unnormalised masses by [P, m] numbers in [0, 1); -1 where all masses are 0.

    Two steps of inverse CDF, block and then column, so that no cumulative sum runs over the whole vocabulary.
    """
    which, rest = _inverse_cdf(blocks, unit * blocks.sum(-1, keepdim=True, dtype=torch.float64))
    columns = which[..., None] * block + torch.arange(block, device=masses.device)
    inside = masses.gather(1, columns.clamp(max=masses.shape[1] - 1).flatten(1)).view(columns.shape)
    place, _ = _inverse_cdf(inside.where(columns < masses.shape[1], 0.0), rest[..., None])
    drawn = which * block + place[..., 0]
    return drawn.where(blocks.amax(-1, keepdim=True) > 0, NOTHING)


def _inverse_cdf(masses: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Look [..., m] cumulative masses up in [..., n] masses.

    Returns:
        Places [..., m] int64, always of an entry with mass where there is one, and what is left of `wanted` within the
        entry.
    """
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=masses.shape[-1] - 1)
    # A parallel cumulative sum may be off by a rounding and end on an entry without mass: take the heaviest instead.
    place = place.where(masses.gather(-1, place) > 0, masses.argmax(-1, keepdim=True))
    mass = masses.gather(-1, place).double()
    return place, (wanted - cumulative.gather(-1, place) + mass).clamp(min=0.0)

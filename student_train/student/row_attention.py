"""Attention over a pack, row by row: the same numbers as scaled dot products under a mask, without the mask.

A pack's mask is B x B although a row sees itself alone, so most of that work is thrown away. Here the rows of a pack
are gathered into rectangles of similar length (within a factor of two), each rectangle is one causal attention without
a mask, for which every device has its fastest kernel, and the results are put back in order.
Cost: for rows of length L, at most 4 L^2 instead of B^2; memory B instead of B^2. *Measured*, training a Qwen3 of 0.36
    M parameters
on packs of 2,048 tokens with 35 rows each, one core: 17,700 tokens per second of processor time, 6,100 with the stock
mask.

Shape letters: B tokens of a pack, R rows of a rectangle, L their longest, A attention heads, G key-value heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "decant_rows"
"""How transformers knows it."""


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Rows of similar length."""

    tokens: Tensor
    """[R * L] index in the pack of each slot; a padded slot repeats its row's last token, and no slot before it sees
    it.
    """
    num_rows: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """Where the rows of a pack are."""

    rectangles: tuple[Rectangle, ...]
    places: Tensor
    """[B] place of each token of the pack in the rectangles' slots, one rectangle after another."""


def layout_of(position_ids: Tensor) -> RowLayout:
    """Return the layout of a pack [1, B] whose rows begin where `position_ids` is 0; reads the beginnings back to the
    host.
    """
    device, num_tokens = position_ids.device, position_ids.shape[1]
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]
    rectangles, places, first_slot = [], torch.empty(num_tokens, dtype=torch.int64), 0
    for members in _of_similar_length(lengths):
        length = max(lengths[row] for row in members)
        slot = torch.arange(length)
        begins = torch.tensor([starts[row] for row in members])
        counts = torch.tensor([lengths[row] for row in members])
        tokens = begins[:, None] + torch.minimum(slot, counts[:, None] - 1)
        is_real = slot < counts[:, None]
        slots = torch.arange(first_slot, first_slot + tokens.numel()).view(tokens.shape)
        places[tokens[is_real]] = slots[is_real]
        first_slot += tokens.numel()
        rectangles.append(Rectangle(tokens.view(-1).to(device), len(members), length))
    return RowLayout(tuple(rectangles), places.to(device))


def _of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows so that none is shorter than half of the longest of its group."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(row)
    return [groups[size] for size in sorted(groups)]


def attend_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_layout: RowLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention [1, B, A, D] of `query` [1, A, B, D] over `key` and `value` [1, G, B, D], each row over itself.

    Without a layout, all of the pack is one row.
    """
    del module, attention_mask, kwargs
    if row_layout is None:
        row_layout = layout_of(torch.arange(query.shape[2], device=query.device)[None])
    shares = query.shape[1] != key.shape[1]
    outputs = []
    for rectangle in row_layout.rectangles:
        rows = [_gathered(tensor, rectangle) for tensor in (query, key, value)]
        mask = _window_mask(rectangle.length, sliding_window, query.device)
        attended = scaled_dot_product_attention(
            rows[0],
            rows[1],
            rows[2],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=shares,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    slots = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return slots.index_select(0, row_layout.places)[None], None


def _gathered(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """Return [R, heads, L, D] of [1, heads, B, D]."""
    rows = tensor[0].index_select(1, rectangle.tokens)
    return rows.view(len(rows), rectangle.num_rows, rectangle.length, -1).transpose(0, 1)


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Return [L, L] of who may be seen under a sliding window, or None where it is wider than every row."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


def switch_attention(model: Any, name: str) -> None:
    """Make a model use the attention of that name, which may be `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_rows)
    model.set_attn_implementation(name)

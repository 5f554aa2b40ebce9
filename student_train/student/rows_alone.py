"""Rows of a pack through the body one length at a time, where layers do not keep them apart in one pass.

Convolutions, states and rotations by the longest row run through a whole pack whatever the positions say. Here rows
of similar length form a rectangle that is filled up on the right, which no causal model sees, and the body runs once
per rectangle, exactly as it does for rows by themselves. Cost: at most 26 % more tokens than the pack has, and as
many passes as it has classes of length.

Shape letters: B tokens of a pack, R rows of a rectangle, L their longest, H hidden width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shared.models.forward.row_length import LengthClass, length_class_of, reset_rotations
from student_train.student.row_attention import layout_of

_MARK = "_decant_rows_alone"
_STEPS_PER_DOUBLING = 3
"""Classes of length within a factor of two: a rectangle is at least 2^(-1/3), 79 %, full."""


def set_rows_alone(body: nn.Module, *, on: bool) -> None:
    """Make `run_body` run rows alone from now on, or not."""
    body.__dict__[_MARK] = on


def are_rows_alone(body: nn.Module) -> bool:
    """Say whether `run_body` runs rows alone."""
    return bool(body.__dict__.get(_MARK, False))


def run_rows_alone(body: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the hidden states [1, B, H] of a pack [1, B] whose rows begin where `position_ids` [1, B] is 0."""
    class_of = length_class_of(body.config.get_text_config())

    def group_of(length: int) -> tuple[int, LengthClass]:
        return math.ceil(math.log2(length) * _STEPS_PER_DOUBLING), class_of(length)

    layout = layout_of(position_ids, group_of)
    states = []
    for rectangle in layout.rectangles:
        reset_rotations(body)
        rows = input_ids[0].index_select(0, rectangle.tokens).view(rectangle.num_rows, rectangle.length)
        states.append(body(input_ids=rows, use_cache=False)[0].flatten(0, 1))
    return torch.cat(states).index_select(0, layout.places)[None]

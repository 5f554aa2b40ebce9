"""Do the rows of a pack keep to themselves? Asked of the model itself before training, whatever its layers are made of.

Cost: three forward passes over a few tokens.

Shape letters: B tokens of a pack, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.errors import TrainingError
from student_train.student.row_attention import NAME as ROW_ATTENTION
from student_train.student.row_attention import switch_attention
from student_train.student.student_head import PROBE_TOKENS, body_of, probe_tokens, relative_distance, run_body


def separate_rows(model: Any, vocab_size: int, *, tolerance: float = 2e-2) -> None:
    """Give a model with stock attention the row by row kind where that changes nothing, and check that packed rows stay
    apart.

    Both are judged by hidden states of a pack of two rows against those of each row alone.

    Raises:
        TrainingError: the rows see each other.
    """
    alone, packed = _rows_alone(model, vocab_size), float("inf")
    if model.config._attn_implementation == "sdpa":
        switch_attention(model, ROW_ATTENTION)
        try:
            packed = relative_distance(_rows_packed(model, vocab_size), alone)
        except TypeError:  # layers that do not hand on what they are given
            packed = float("inf")
        if packed > tolerance:
            switch_attention(model, "sdpa")
    if packed > tolerance:
        packed = relative_distance(_rows_packed(model, vocab_size), alone)
    if packed > tolerance:
        raise TrainingError(
            f"rows of one pack see each other in {type(model).__name__} with attention "
            f"'{model.config._attn_implementation}' (hidden states differ by {packed:.1%}); "
            "set student.attention to sdpa, or choose a student whose layers keep packed rows apart"
        )


def _rows_alone(model: Any, vocab_size: int) -> Tensor:
    """Return hidden states [1, 3 PROBE_TOKENS, H] of a short and a long row, each by itself."""
    return torch.cat([_hidden(model, row, torch.arange(row.shape[1])) for row in _two_rows(model, vocab_size)], dim=1)


def _rows_packed(model: Any, vocab_size: int) -> Tensor:
    """Return hidden states [1, 3 PROBE_TOKENS, H] of the same rows in one pack."""
    rows = _two_rows(model, vocab_size)
    return _hidden(model, torch.cat(rows, dim=1), torch.cat([torch.arange(row.shape[1]) for row in rows]))


def _two_rows(model: Any, vocab_size: int) -> tuple[Tensor, Tensor]:
    return probe_tokens(model, vocab_size, seed=1), probe_tokens(model, vocab_size, seed=2, num_tokens=2 * PROBE_TOKENS)


def _hidden(model: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hidden = run_body(body_of(model), input_ids, positions[None].to(input_ids.device))
    model.train(was_training)
    return hidden

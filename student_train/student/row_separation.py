"""Do the rows of a pack keep to themselves? Asked of the model itself before training, whatever its layers are made of.

Two questions, both about dependence and not about the size of whatever the weights are now. Does a row's state have a
gradient by the embeddings of another row? It must be zero exactly. And are the states of a pack those of each row
alone, under the model's own attention, with rows as long as the stage's longest, so that windows and rotations that
change with length take part? They may differ by rounding in float32, in which the layers compute for this check.

Ways are tried from fast to slow: attention row by row, the stock attention under the pack's mask, the whole body row
by row. Cost: a few forward passes of one long and some short rows.

Shape letters: B tokens of a pack, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shared.errors import TrainingError
from shared.models.forward.attention_choice import faithful_attention
from shared.models.forward.causality import PREFIX
from shared.models.forward.evaluating import evaluating
from shared.models.forward.row_length import rope_switches
from shared.models.forward.wide_weights import widest
from shared.models.no_numbers import NO_NUMBERS
from student_train.student.row_attention import NAME as ROW_ATTENTION
from student_train.student.row_attention import switch_attention
from student_train.student.rows_alone import run_rows_alone, set_rows_alone
from student_train.student.student_head import PROBE_TOKENS, body_of, probe_tokens, run_body

ROUNDING = 1e-4
"""Largest difference of a token's state that counts as rounding in float32, over the states' standard deviation: 36
layers amplify the float's own 6e-8 to about 1e-6 on average, wide random weights to 6e-5 at most (*measured* over 50
families)."""
NARROW_ROUNDING = 5e-2
"""The same in 16 bits, for kernels that know nothing else."""
SHORT = (PROBE_TOKENS, PROBE_TOKENS - 2, 2 * PROBE_TOKENS)
"""Tokens of the short probe rows."""


def separate_rows(model: Any, vocab_size: int, *, longest: int | None = None) -> str:
    """Choose the fastest way in which the rows of a pack stay apart, set it, and return it: `rows`, `stock` or `alone`.

    Args: model: the causal language model below any adapter. vocab_size: tokens to draw probes from. longest: tokens
        of the longest row that it will see; None: beyond every length that its config names, up to 2,048.

    Raises:
        TrainingError: no way keeps them apart, a prompt is read in both directions, or the model computes NaN.
    """
    body, wanted = body_of(model), model.config._attn_implementation
    if getattr(model.config.get_text_config(), "prefix_lm", False):
        raise TrainingError(f"{type(model).__name__} {PREFIX}")
    set_rows_alone(body, on=False)
    lengths = (*SHORT, longest or _telling_length(model))
    rows = [probe_tokens(model, vocab_size, seed, length) for seed, length in enumerate(lengths, start=1)]
    short, pack = rows[: len(SHORT)], [rows[0], rows[3], rows[1], rows[2]]
    width, is_wide = widest(model)
    tolerance = ROUNDING if is_wide else NARROW_ROUNDING
    with width, evaluating(model):
        plain = faithful_attention(model, lambda: _alone(body, short[:1]))
        switch_attention(model, plain)
        expected = _alone(body, pack)
        if bool(expected.isnan().any()):
            raise TrainingError(NO_NUMBERS)
        is_free = wanted == "sdpa" or not getattr(model, "_supports_sdpa", True)  # of eager where eager is asked for
        ways = [("rows", ROW_ATTENTION), ("stock", plain)] if is_free else [("stock", plain)]
        for way, attention in ways:
            switch_attention(model, attention)
            try:
                found = _distance(_packed(body, pack), expected)
            except (TypeError, ValueError, IndexError):  # layers that hand nothing on, or a model without positions
                continue
            if found <= tolerance and _is_independent(model, short):
                return way
        set_rows_alone(body, on=True)
        found = _distance(_packed(body, pack), expected)
        if found <= NARROW_ROUNDING and _is_causal(model, short[-1]):
            return "alone"
    raise TrainingError(
        f"{type(model).__name__} lets tokens see what comes after them, so it cannot be trained to predict the next "
        "one; choose a causal language model as student"
    )


def _telling_length(model: Any) -> int:
    """Return a length beyond every window, chunk and switch that the config names."""
    config = model.config.get_text_config()
    names = ("window", "chunk", "local", "original_max_position")
    lengths = [value for name, value in _integers(config.to_dict()) if any(part in name for part in names)]
    lengths = [length for length in (*lengths, *(most for _, most in rope_switches(config))) if length <= 2048]
    return max([PROBE_TOKENS, *lengths]) + PROBE_TOKENS


def _integers(section: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield (name, value) of every integer of a config, at any depth."""
    if isinstance(section, dict):
        for key, value in section.items():
            yield from _integers(value, str(key))
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _integers(value, name)
    elif isinstance(section, int) and not isinstance(section, bool):
        yield name, section


def _alone(body: Any, rows: list[Tensor]) -> Tensor:
    """Return hidden states [1, B, H] of rows [1, L], each by itself."""
    positions = [torch.arange(row.shape[1], device=row.device)[None] for row in rows]
    return torch.cat([run_rows_alone(body, row, places) for row, places in zip(rows, positions, strict=True)], dim=1)


def _packed(body: Any, rows: list[Tensor]) -> Tensor:
    """Return hidden states [1, B, H] of the same rows in one pack."""
    positions = torch.cat([torch.arange(row.shape[1], device=row.device) for row in rows])
    return run_body(body, torch.cat(rows, dim=1), positions[None])


def _distance(got: Tensor, expected: Tensor) -> float:
    """Return the largest mean absolute difference of a token's state, over the standard deviation of all states."""
    difference = (got.float() - expected.float()).abs().mean(-1).max()
    return float(difference / expected.float().std().clamp_min(1e-30))


def _is_independent(model: Any, rows: list[Tensor]) -> bool:
    """Say whether no row's states have a gradient by another row's embeddings."""
    lengths = [row.shape[1] for row in rows]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    with _embeddings(model) as embedded:
        states = _packed(body_of(model), rows)[0]
        for end, length in zip(ends, lengths, strict=True):
            reached = _reached(states[end - length : end], embedded, len(states))
            if reached[: end - length].any() or reached[end:].any():
                return False
    return True


def _is_causal(model: Any, row: Tensor) -> bool:
    """Say whether states of the first half of a row have no gradient by the embeddings of its second half."""
    half = row.shape[1] // 2
    with _embeddings(model) as embedded:
        states = _alone(body_of(model), [row])[0]
        return not _reached(states[:half], embedded, len(states))[half:].any()


def _reached(states: Tensor, embedded: list[Tensor], num_tokens: int) -> Tensor:
    """Return [B] bool: a random sum of states [n, H] has a gradient by an embedding of that token.

    Some models turn the embeddings round, [B, 1, H], so tokens are counted; where they cannot be, all are reached.
    """
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    found = torch.autograd.grad((states * direction).sum(), embedded, retain_graph=True, materialize_grads=True)
    by_token = [gradient.flatten(0, -2).any(-1) for gradient in found]
    if not by_token or any(len(reached) != num_tokens for reached in by_token):
        return torch.ones(num_tokens, dtype=torch.bool)
    return torch.stack(by_token).any(0)


@contextmanager
def _embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Keep what comes out of the embeddings, with a gradient; the model goes on with a copy, which it may write to."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield kept
    finally:
        handle.remove()

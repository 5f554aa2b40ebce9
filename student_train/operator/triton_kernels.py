"""Two passes over a tile of logits in Triton: an online log-sum-exp, and the gradient of what no member holds.

The first reads a tile once where torch reads or writes it four times (maximum, difference, exp, sum); the second reads
and writes it once. A row belongs to one program in the first kernel, so nothing is added up in an order that may
change. A kernel may name no type but constexpr.

Shape letters: S positions, W width of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Columns that a program takes at a time."""


@triton.jit
def _online_logsumexp(
    tile,
    stride,
    width,
    temperature,
    row_max,
    row_sum,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.load(row_max + row)
    total = tl.load(row_sum + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(tile + row * stride + columns, mask=columns < width, other=float("-inf")) / temperature
        new = tl.maximum(largest, tl.max(logits, axis=0))
        level = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - level) + tl.sum(tl.exp(logits - level), axis=0)
        largest = new
    tl.store(row_max + row, largest)
    tl.store(row_sum + row, total)


@triton.jit
def _rest_gradient(
    tile,
    stride,
    out,
    out_stride,
    width,
    temperature,
    log_rest,
    coefficient,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = tl.load(tile + row * stride + columns, mask=inside, other=float("-inf")) / temperature
    gradient = tl.exp(logits - tl.load(log_rest + row)) * tl.load(coefficient + row)
    if ADD:
        gradient += tl.load(out + row * out_stride + columns, mask=inside, other=0.0)
    tl.store(out + row * out_stride + columns, gradient, mask=inside)


def add_to_logsumexp(tile: Tensor, temperature: float, row_max: Tensor, row_sum: Tensor) -> None:
    """Take a tile [S, W] of plain logits into running maxima [S] and sums [S] of exp(logits / T -
    maximum), in place.
    """
    _online_logsumexp[(len(tile),)](tile, tile.stride(0), tile.shape[1], temperature, row_max, row_sum, BLOCK=BLOCK)


def write_rest_gradient(
    tile: Tensor, out: Tensor, temperature: float, log_rest: Tensor, coefficient: Tensor, *, add: bool
) -> None:
    """Write exp(logits / T - log_rest) x coefficient of a tile [S, W] to `out` [S, W], or add it; -inf gives 0.

    `out` may be the tile. `log_rest` and `coefficient` are [S]; `log_rest` must be finite.
    """
    grid = (len(tile), triton.cdiv(tile.shape[1], BLOCK))
    strides = (tile, tile.stride(0), out, out.stride(0))
    _rest_gradient[grid](*strides, tile.shape[1], temperature, log_rest, coefficient, ADD=add, BLOCK=BLOCK)

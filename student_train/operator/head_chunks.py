"""The student's head over chunks of positions: logits into one reused buffer, and gradients of logits back through the
head.

Logits are softcap(scale (h W^T + b)), in float32 even where h and W are bfloat16 (`torch.mm` with a wide output where
the device has one, else products of float32 copies), in float64 where the inputs are. Buffers are a little wider than
the vocabulary: what lies beyond column V reads as -inf and serves as the dump of padded slots. The gradient of W is
accumulated in float32. Products take P rows of the head, a multiple of 16: tensor cores are slow on matrices whose
sides are odd, as a tokenizer of 151,669 makes them. The rows beyond V are the model's own padding, or zeros where W is
copied anyway; their logits are overwritten and their gradients 0.
Cost: one matrix product forward, one per gradient asked for; memory: the chunk's buffers, W's gradient once, and, where
the type of W must change, one copy of W. [positions, vocabulary] is never held.

Shape letters: S positions, C positions of a chunk, H hidden width, V vocabulary, P rows that are multiplied (from V to
W), W width of a buffer (above V, a multiple of 16).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import TrainingError
from student_train.batch.target_batch import TargetBatch

ALIGNMENT = 16
"""Rows and columns of products are a multiple of it: 32 bytes of bfloat16, 64 of float32."""
CHUNK_BYTES = 256 * 2**20
"""Bytes of all buffers [C, W] together, where nothing else is asked for; chunks are as long as that allows."""
MIN_CHUNK_POSITIONS = 16
"""Shorter chunks starve the matrix products, so the budget gives way."""


@functools.cache
def _has_wide_products(device_type: str) -> bool:
    """Say whether products of bfloat16 matrices can be written as float32 into a strided buffer on this kind of
    device.
    """
    if device_type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    wide = torch.zeros(16, 32, dtype=torch.float32, device=device_type)
    try:
        with torch.autocast(device_type, enabled=False):
            torch.mm(ones, ones, out_dtype=torch.float32, out=wide[:, :16])
    except torch.OutOfMemoryError:  # says nothing of the products
        raise
    except RuntimeError:  # what torch raises where cuBLAS has none for this device; a broken device fails again at once
        return False
    return bool((wide[:, :16] == 16).all() and (wide[:, 16:] == 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A student's output head, detached, ready for products in `compute_dtype`."""

    weight: Tensor
    """[P, H] in `compute_dtype`; the first V rows count."""
    vocab_size: int
    """V."""
    bias: Tensor | None
    """[V] in `dtype`, scaled already."""
    scale: float
    """What logits are multiplied by before the soft cap."""
    softcap: float | None
    """Logits are softcap tanh(logits / softcap)."""
    dtype: torch.dtype
    """Type of logits and of accumulated gradients: float32, or float64 where the inputs are."""

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        vocab_size: int | None = None,
    ) -> Head:
        """Prepare a head for the given hidden states; the first `vocab_size` rows of the weight are the vocabulary.

        Raises:
            TrainingError: the head is smaller than the vocabulary, or the soft cap is not above 0.
        """
        num_rows = weight.shape[0] if vocab_size is None else vocab_size
        if num_rows > weight.shape[0]:
            raise TrainingError(
                f"the student's head has {weight.shape[0]} rows and the tokenizer {num_rows} tokens; "
                "use a student of the same tokenizer"
            )
        if softcap is not None and softcap <= 0:
            raise TrainingError(
                f"the student's logits have a soft cap of {softcap:g}; it must be above 0, or None for no cap"
            )
        types = {hidden.dtype, weight.dtype}
        dtype = torch.float64 if torch.float64 in types else torch.float32
        narrow = hidden.dtype == torch.bfloat16 and dtype == torch.float32 and _has_wide_products(hidden.device.type)
        weight = _padded(weight.detach(), num_rows, torch.bfloat16 if narrow else dtype)
        if bias is not None:
            bias = bias.detach()[:num_rows].to(dtype) * scale
        return Head(weight, num_rows, bias, scale, softcap, dtype)

    def part(self, first: int, stop: int) -> Head:
        """Return the head of the tokens from `first` to before `stop`, which takes further rows along as padding."""
        padded = min(first + _aligned(stop - first), len(self.weight))
        bias = None if self.bias is None else self.bias[first:stop]
        return Head(self.weight[first:padded], stop - first, bias, self.scale, self.softcap, self.dtype)

    @property
    def buffer_width(self) -> int:
        """W, columns of a buffer: at least one beyond the vocabulary, rows aligned to 64 bytes."""
        return (self.vocab_size // ALIGNMENT + 1) * ALIGNMENT

    def buffer(self, num_positions: int) -> Tensor:
        """Return [C, W] uninitialised memory for a chunk's logits."""
        return torch.empty(num_positions, self.buffer_width, dtype=self.dtype, device=self.weight.device)

    def chunk_size(
        self, num_positions: int, num_buffers: int, chunk_positions: int | None, chunk_bytes: int | None = None
    ) -> int:
        """Return how many positions a chunk has at most; at least 1. The budget is `chunk_bytes`, or `CHUNK_BYTES`.

        Raises:
            TrainingError: `chunk_positions` is below 1.
        """
        if chunk_positions is not None and chunk_positions < 1:
            raise TrainingError(
                f"chunk_positions is {chunk_positions}; it must be at least 1, or None for what fits {CHUNK_BYTES} "
                "bytes"
            )
        by_budget = (chunk_bytes or CHUNK_BYTES) // (self.buffer_width * self.dtype.itemsize * num_buffers)
        size: int = max(by_budget, MIN_CHUNK_POSITIONS) if chunk_positions is None else chunk_positions
        return max(min(size, num_positions), 1)

    def input_of(self, hidden: Tensor) -> Tensor:
        """Return [C, H] scaled hidden states in the type of the weight."""
        hidden = hidden.detach()
        return (hidden.to(self.dtype) * self.scale if self.scale != 1.0 else hidden).to(self.weight.dtype)

    def logits_into(self, out: Tensor, hidden: Tensor, slope: Tensor | None = None) -> None:
        """Write [C, V] logits of `input_of` hidden states into a buffer, -inf beyond them.

        With a soft cap, `slope` [C, W] receives the derivative of capped by uncapped logits.
        """
        products, logits = out[:, : len(self.weight)], out[:, : self.vocab_size]
        if hidden.dtype == self.dtype:
            torch.mm(hidden, self.weight.t(), out=products)
        else:
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=products)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(logits, logits, out=slope[:, : self.vocab_size]).neg_().add_(1.0)
            logits.mul_(self.softcap)
        out[:, self.vocab_size :] = -torch.inf


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT


def _padded(weight: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return [P, H] of which the first `num_rows` are those of a head [rows, H], in a type; a view where that does."""
    wanted = _aligned(num_rows)
    if wanted <= len(weight) or (weight.dtype == dtype and dtype != torch.bfloat16):
        return weight[:wanted].to(dtype)
    padded = weight.new_zeros(wanted, weight.shape[1], dtype=dtype)
    padded[:num_rows].copy_(weight[:num_rows])
    return padded


def check_positions(vocab_size: int, hidden: Tensor, labels: Tensor, targets: TargetBatch | None) -> None:
    """Check that hidden states, labels and targets are of the same positions and that every id is in the vocabulary.

    Raises:
        TrainingError: an id is outside the vocabulary.
        ValueError: the lengths differ.
    """
    lengths = {len(hidden), len(labels)}
    if targets is not None and targets.positions is None:
        lengths.add(targets.num_positions)
    if targets is not None and targets.positions_host is not None and len(targets.positions_host):
        lengths.add(max(len(labels), int(targets.positions_host[-1]) + 1))
    if len(lengths) != 1:
        raise ValueError(f"hidden states, labels and targets must have one entry per position, not {sorted(lengths)}")
    if len(labels) == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(labels))
    highest = max(highest, -1 if targets is None else targets.max_token_id)
    if lowest < 0 or highest >= vocab_size:
        raise TrainingError(
            f"token id {lowest if lowest < 0 else highest} was found where the student's head has tokens 0 to "
            f"{vocab_size - 1}; use a cache made with the student's tokenizer"
        )


def chunks(num_positions: int, size: int) -> Iterator[slice]:
    """Yield slices of the positions, `size` of them each but the last."""
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


@dataclass(slots=True, eq=False)
class HeadGradients:
    """Gradients that build up chunk by chunk; None where they are not asked for."""

    hidden: Tensor | None
    """[S, H] in the head's `dtype`."""
    weight: Tensor | None
    """[all rows of the weight, H] in the head's `dtype`; rows beyond the vocabulary stay 0."""
    bias: Tensor | None
    """[all rows of the weight]."""

    @staticmethod
    def zeros(head: Head, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> HeadGradients:
        """Allocate accumulators for those inputs that are given."""
        inputs = (hidden, weight, bias)
        return HeadGradients(
            *(None if x is None else torch.zeros(x.shape, dtype=head.dtype, device=x.device) for x in inputs)
        )

    def add(self, head: Head, where: slice, hidden: Tensor, logits_gradient: Tensor) -> None:
        """Add a chunk: `hidden` [C, H] from `input_of`, `logits_gradient` [C, W] by uncapped logits."""
        logits_gradient[:, head.vocab_size :] = 0.0
        gradient = logits_gradient[:, : len(head.weight)]
        if self.bias is not None:
            self.bias[: head.vocab_size].add_(gradient[:, : head.vocab_size].sum(0), alpha=head.scale)
        rows = None if self.weight is None else self.weight[: len(head.weight)]
        if head.weight.dtype == head.dtype:
            if self.hidden is not None:
                torch.mm(gradient, head.weight, out=self.hidden[where])
            if rows is not None:
                rows.addmm_(gradient[:, : len(rows)].t(), hidden)
        else:
            narrow = gradient.to(head.weight.dtype)
            if self.hidden is not None:
                torch.mm(narrow, head.weight, out_dtype=head.dtype, out=self.hidden[where])
            if rows is not None:
                rows.add_(torch.mm(narrow.t(), hidden, out_dtype=head.dtype)[: len(rows)])
        if self.hidden is not None and head.scale != 1.0:
            self.hidden[where].mul_(head.scale)

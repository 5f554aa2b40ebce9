"""Row by row attention where torch would keep [L, L] scores: float32, and a window; errors and memory.

Against dense attention in float64 at a short length; at a long one the peak of forward and backward pass over the bytes
that the scores alone would take. Below 1 no kernel kept them.

Shape letters: L tokens of a row, A heads.
"""

from __future__ import annotations

from typing import Any

from tools.gpu.measuring import device, distance, peak_gib

HEADS, SHARED, WIDTH = 32, 8, 128


def _inputs(length: int, dtype: Any) -> list[Any]:
    import torch

    torch.manual_seed(0)
    shapes = [(1, heads, length, WIDTH) for heads in (HEADS, SHARED, SHARED)]
    return [torch.randn(shape, device=device()).to(dtype).requires_grad_() for shape in shapes]


def _attended(inputs: list[Any], window: int | None) -> list[Any]:
    """Return the output and the gradients."""
    import torch

    from student_train.student.row_attention import attend_rows

    output = attend_rows(None, *inputs, sliding_window=window)[0]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _dense(inputs: list[Any], window: int | None) -> list[Any]:
    """Return the same from plain scores."""
    import torch

    query, key, value = inputs
    key, value = (tensor.repeat_interleave(HEADS // SHARED, dim=1) for tensor in (key, value))
    places = torch.arange(query.shape[2], device=query.device)
    behind = places[:, None] - places
    hidden = (behind < 0) | (behind >= (window or len(places)))
    weights = (query @ key.transpose(2, 3) * WIDTH**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    output = (weights @ value).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def measure(*, dry_run: bool) -> dict[str, Any]:
    """Return errors, and peaks over the bytes of scores."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    short, long = (24, 48) if dry_run else (512, 8192)
    figures: dict[str, Any] = {}
    for name, dtype, window in (
        ("float32", torch.float32, None),
        ("float32_window", torch.float32, short // 4),
        ("bfloat16", torch.bfloat16, None),
        ("bfloat16_window", torch.bfloat16, short // 4),
    ):
        inputs = _inputs(short, dtype)
        exact = _dense([tensor.detach().double().requires_grad_() for tensor in inputs], window)
        figures[f"error_{name}"] = distance(_attended(inputs, window), exact)
        peak = peak_gib(lambda: _attended(_inputs(long, dtype), window))  # noqa: B023
        scores = HEADS * long**2 * dtype.itemsize / 2**30
        figures[f"peak_over_scores_{name}"] = None if peak is None else peak / scores
    return figures

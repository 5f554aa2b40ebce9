"""Does the plug-in still give the right rows when several prompts are scored together, and one over several passes?

A probe alone shows neither: a row taken for its neighbour, a piece that is joined in another order, or the second
thousand of rows (the V2 runner scores 1,024 at a time) come up only in a full batch. So long prompts are scored
together with the probe: on the V2 runner more tokens than one pass takes, and more than 1,024 rows; on the V1 runner,
where tokens cost seconds, one prompt of up to 256. The reference of a long prompt is its stock top-k columns, that of
the probe its full-width rows; the draws are held against the probabilities that they were drawn by.
Cost: two prefills of at most a batch on a GPU, a second; of 256 tokens on a CPU.

Shape letters: P positions of a prompt, V entries of the model's head, K head entries, J temperatures, m draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.vllm.vllm_settings import ROWS_AT_ONCE

Columns = tuple[NDArray[np.int32], NDArray[np.float32]]

LONG_TOKENS = {"v1": 256, "v2": ROWS_AT_ONCE + 76}
MOST_PROMPTS = 16
BATCH_TOLERANCE_NATS = {"float32": 0.01}
"""Mean difference between two batches, by the model's type; kernels of 16 bits round other batches otherwise."""
TOLERANCE_NATS = 0.15
MOST_DEVIATION = 6.0
"""Standard deviations: the draws' mean log-probability lies beyond by chance in one start of a thousand million."""


def long_prompts(runner: str, longest: int, batch_tokens: int, vocab_size: int) -> list[list[int]]:
    """Return equal prompts, together longer than a pass on V2; `long_prompts("v1", 64, 8192, 512)` -> one of 64 tokens.

    Args:
        runner: v1 | v2.
        longest: tokens of the longest prompt.
        batch_tokens: tokens of one pass.
        vocab_size: of the tokenizer.
    """
    length = min(LONG_TOKENS[runner], longest)
    prompt = [int(token) for token in (np.arange(1, length + 1, dtype=np.int64) * 7919) % vocab_size]
    return [prompt] * (1 if runner == "v1" else min(MOST_PROMPTS, batch_tokens // length + 2))


def batch_problem(found: Columns, stock: Columns, prompt: list[int], layout: ColumnLayout, dtype: str) -> str | None:
    """Compare the plug-in's rows of a prompt with its stock top-k rows and say what differs, or None.

    Args:
        found: ids and values [P, 1 + layout.num_extra].
        stock: ids and values [P, 1 + K].
        prompt: its tokens, P + 1.
        layout: what the rows hold.
        dtype: of the model.
    """
    ids, values = found
    if ids.shape != (len(prompt) - 1, 1 + layout.num_extra) or ids[:, 0].tolist() != prompt[1:]:
        return "its rows of a batch are not those of the prompt"
    if not (ids[:, layout.tail_start : layout.draw_start] == np.asarray(layout.sentinels)).all():
        return "its rows of a batch do not all carry the sentinels"
    tolerance = BATCH_TOLERANCE_NATS.get(dtype, TOLERANCE_NATS)
    labels = np.abs(values[:, 0].astype(np.float64) - stock[1][:, 0])
    head, wanted = values[:, 1 : 1 + layout.num_head].astype(np.float64), stock[1][:, 1:].astype(np.float64)
    real = (stock[0][:, 1:] < layout.vocab_size).all(1, keepdims=True)  # a padded entry takes a place among stock rows
    kept = (ids[:, 1 : 1 + layout.num_head] >= 0) & real
    heads = np.abs(np.where(kept, head, 0.0) - np.where(kept, -np.sort(-wanted, axis=1), 0.0))
    for name, differences in (("labels", labels), ("head", heads)):
        pieces = np.array_split(differences, -(-len(differences) // 64))
        worst = max(float(piece.mean()) if piece.size else 0.0 for piece in pieces)
        if worst > tolerance:
            return f"the {name} of rows in a batch are {worst:.3g} nats off"
    if 1.0 in layout.temperatures:
        tail = values[:, layout.tail_start + layout.temperatures.index(1.0)].astype(np.float64)
        entries = values[:, 1 : layout.tail_start].astype(np.float64)
        mass = np.exp(np.where(ids[:, 1 : layout.tail_start] >= 0, entries, -np.inf)).sum(1) + np.exp(tail)
        if float(np.abs(mass - 1.0).max()) > 0.01:
            return f"head and tail of a row in a batch sum to {float(mass[np.abs(mass - 1.0).argmax()]):.3g}"
    return None


def head_entries(ids: NDArray[np.int32], shape: tuple[int, ...], layout: ColumnLayout) -> NDArray[np.bool_]:
    """Mark the entries [P, V] that the heads of rows [P, 1 + layout.num_extra] hold."""
    marked = np.zeros(shape, dtype=bool)
    rows, columns = np.nonzero(ids[:, 1 : layout.tail_start] >= 0)
    marked[rows, ids[rows, 1 + columns]] = True
    return marked


def draws_problem(ids: NDArray[np.int32], dense: NDArray[np.float64], layout: ColumnLayout) -> str | None:
    """Hold the draws of the probe's rows [P, 1 + layout.num_extra] against the rows' tails [P, V], or return None.

    The mean of log p over all draws of a temperature has a known expectation and variance under p.
    """
    if not layout.num_draws:
        return None
    outside = ~head_entries(ids, dense.shape, layout)
    outside[:, layout.vocab_size :] = False
    drawn = ids[:, layout.draw_start :].astype(np.int64).reshape(len(ids), len(layout.temperatures), layout.num_draws)
    for j, temperature in enumerate(layout.temperatures):
        scaled = np.where(outside, dense, -np.inf) / temperature
        some = np.isfinite(scaled).any(1)
        if not some.any():
            continue
        logprobs = scaled[some] - np.logaddexp.reduce(scaled[some], axis=1, keepdims=True)
        chosen = drawn[some, j]
        if bool((chosen < 0).any()) or bool((chosen >= layout.vocab_size).any()):
            return f"it did not draw {layout.num_draws} tokens at temperature {temperature:g}"
        said = np.take_along_axis(logprobs, chosen, 1)
        with np.errstate(invalid="ignore"):
            weighted = np.where(np.isfinite(logprobs), np.exp(logprobs) * logprobs, 0.0)
            mean = weighted.sum(1)
            variance = np.where(np.isfinite(logprobs), weighted * logprobs, 0.0).sum(1) - mean**2
        deviation = float((said - mean[:, None]).sum() / max(1e-6, float(layout.num_draws * variance.sum()) ** 0.5))
        if not abs(deviation) <= MOST_DEVIATION and float(np.abs(said.mean() - mean.mean())) > 0.01:
            return (
                f"its draws at temperature {temperature:g} do not follow the tail ({deviation:.1f} standard deviations)"
            )
    return None

"""Choose the next token of each answer from its logits, from the answer's own seed alone.

Number n of an answer comes from (seed, n) by a counter-based mix, so neither the batch nor other answers change it.
Order of settings as in vLLM: temperature, then top_k, then top_p on what top_k left. The choice is an inverse-CDF
look-up in float64.

Shape letters: R answers of a batch, V entries of the model's head.
"""

from __future__ import annotations

import torch

from shared.recipe.recipe import Generate
from teacher_cache.engines.columns.draw_keys import uniforms


def next_tokens(
    logits: torch.Tensor, seeds: torch.Tensor, step: int, settings: Generate, vocab_size: int
) -> torch.Tensor:
    """Return [R] int64 tokens.

    Args:
        logits: [R, V], any float type.
        seeds: [R] int64, one per answer.
        step: tokens that the answers already have.
        settings: temperature, top_p, top_k.
        vocab_size: ids from here on are padding and never chosen.
    """
    scores = logits[:, :vocab_size].to(torch.float64)
    if settings.temperature == 0:
        return scores.argmax(-1)
    scores = scores / settings.temperature
    order: torch.Tensor | None = None
    if settings.top_k or settings.top_p < 1.0:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        if settings.top_k:
            scores[:, settings.top_k :] = -torch.inf
        probabilities = scores.softmax(-1)
        if settings.top_p < 1.0:
            probabilities[probabilities.cumsum(-1) - probabilities >= settings.top_p] = 0.0
    else:
        probabilities = scores.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    unit = uniforms(seeds, float(step), 1)
    wanted = torch.minimum(unit.to(total.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=scores.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen))[:, 0]

"""What a model does with rows in a batch, asked of the model itself: is padding seen, do cached states continue a row?

Recurrent models read padding as text; some keep no states under the name that transformers' attention layers do, and
see each further token alone; one drops keys from its cache beyond a window that its attention does not have. Both are
compared with whole rows in float32, where only rounding may differ.
Cost: a few forward passes of two short rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from shared.models.forward.causality import ROUNDING, sees_what_follows
from shared.models.forward.wide_weights import in_float32

_SHORT_ROW = 7
_UNFIT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What models with a cache of their own raise when they meet another."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Names in a config by which transformers' masks and caches learn how many tokens a layer looks back."""
_SHORT_WINDOW = 4


class Asked(Protocol):
    """What is asked here of a model."""

    model: Any
    tokenizer: Any
    config: Any
    device: torch.device
    num_entries: int

    def hidden(self, token_ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Return [R, T, H] last hidden states."""


def probe_tokens(model: Asked, num_tokens: int) -> torch.Tensor:
    """Return [1, num_tokens] tokens."""
    tokens = torch.arange(1, num_tokens + 1, device=model.device)[None] * 97
    return tokens % min(len(model.tokenizer), model.num_entries)


def is_causal(model: Asked) -> bool:
    """Say whether no token sees what comes after it."""
    row, ids = probe_tokens(model, 2 * _SHORT_ROW), min(len(model.tokenizer), model.num_entries)
    with in_float32(model.model):
        return not sees_what_follows(model.model, lambda rows: model.hidden(rows, torch.ones_like(rows)), row, ids)


def padding_is_unseen(model: Asked) -> bool:
    """Say whether a row's states are the same in a batch that is padded on either side."""
    row, length = probe_tokens(model, _SHORT_ROW), 2 * _SHORT_ROW
    with in_float32(model.model):
        alone = model.hidden(row, torch.ones_like(row))[0]
        for start in (0, length - _SHORT_ROW):
            tokens, mask = _two_rows(model, length)
            mask[1] = 0
            mask[1, start : start + _SHORT_ROW] = 1
            tokens[1, start : start + _SHORT_ROW] = row[0]
            padded = model.hidden(tokens, mask)[1, start : start + _SHORT_ROW]
            if not _are_equal(padded, alone):
                return False
    return True


def empty_cache(model: Asked) -> Any:
    """Return a cache of transformers in which nothing is yet."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_is_whole(model: Asked, *, pads: bool) -> bool:
    """Say whether states that follow a cache are those of the whole rows, token by token, also beyond a window.

    Args:
        model: what is asked.
        pads: rows are filled up on the left when they are answered together.
    """
    length = 2 * _SHORT_ROW
    tokens, mask = _two_rows(model, length)
    if pads:
        mask[1, :3] = 0
    with in_float32(model.model), _short_windows(model.config):
        whole = model.hidden(tokens, mask)[:, _SHORT_ROW - 1 :]
        cache, start, found = empty_cache(model), 0, []
        try:
            for end in range(_SHORT_ROW, length + 1):
                found.append(model.hidden(tokens[:, start:end], mask[:, :end], cache)[:, -1])
                start = end
        except torch.OutOfMemoryError:  # says nothing of the cache
            raise
        except _UNFIT:
            return False
    return _are_equal(torch.stack(found, 1), whole)


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Shorten the windows of masks and caches alike, so that the probe's rows are longer than any."""
    found = {name: getattr(config, name, None) for name in _WINDOWS}
    wide = {name: value for name, value in found.items() if isinstance(value, int) and value > _SHORT_WINDOW}
    try:
        for name in wide:
            setattr(config, name, _SHORT_WINDOW)
        yield
    finally:
        for name, value in wide.items():
            setattr(config, name, value)


def _two_rows(model: Asked, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [2, num_tokens] tokens of the probe, twice, and as many ones."""
    tokens = probe_tokens(model, num_tokens).repeat(2, 1)
    return tokens, torch.ones_like(tokens)


def _are_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether states [..., H] differ by rounding alone."""
    return bool((found - expected).abs().mean(-1).max() <= ROUNDING * expected.float().std())

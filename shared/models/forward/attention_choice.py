"""Which stock attention of transformers a model may run with, so that nothing of its own attention is left out in
silence.

transformers' `sdpa` takes options that it does not know and ignores them: a soft cap on the scores, sinks, chosen
keys. `eager` is the model's own. Which options a model's layers hand over is seen in a forward pass. Cost: that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

IGNORED_BY_SDPA = ("softcap", "s_aux", "indices", "block_indices")
"""Options of an attention function that change its result and that transformers' sdpa drops."""


@contextmanager
def attention_options(name: str) -> Iterator[set[str]]:
    """Collect the names of options that are set when the attention function `name` of transformers is called."""
    from transformers import AttentionInterface

    seen = set[str]()
    plain = AttentionInterface().get(name)
    if plain is None:  # eager, or a model's own: nothing is looked up
        yield seen
        return

    def attend(*args: Any, **options: Any) -> Any:
        seen.update(key for key, value in options.items() if value is not None)
        return plain(*args, **options)

    AttentionInterface.register(name, attend)
    try:
        yield seen
    finally:
        AttentionInterface.register(name, plain)


def faithful_attention(model: Any, run: Callable[[], object]) -> str:
    """Return the stock attention that computes all of a model's attention: its own choice, or eager where sdpa ignores
    something.

    Args:
        model: of transformers.
        run: a forward pass of it.
    """
    name: str = model.config._attn_implementation
    if name != "sdpa":
        return name
    with attention_options(name) as seen:
        run()
    return "eager" if seen.intersection(IGNORED_BY_SDPA) else name

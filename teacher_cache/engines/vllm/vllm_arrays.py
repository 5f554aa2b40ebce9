"""Front end of vLLM: keep the arrays of prompt log-probabilities that arrive, instead of a dict per position.

Replaces `LogprobsProcessor._update_prompt_logprobs` in this process while an engine is open. The stock method turns
every number into Python objects: 12,000 positions per second at 64 entries, and 7 KB each; arrays cost a copy. The
replacement is installed only on a version and a signature that are known, and the engine's self-test compares its first
result with the stock path; otherwise `flat_logprobs` is read, which `columns_of` understands as well.

Shape letters: T tokens of a prompt, W columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError


class PromptArrays:
    """What stands in `RequestOutput.prompt_logprobs`: rows for tokens 1..T-1 of the prompt."""

    __slots__ = ("ids", "logprobs")

    def __init__(self, ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Keep ids [T - 1, W] and natural logs [T - 1, W]."""
        self.ids = ids
        self.logprobs = logprobs

    def __len__(self) -> int:
        """Return T, as the stock lists count: their first entry is None."""
        return len(self.ids) + 1


_stock: Callable[..., None] | None = None


def install() -> str | None:
    """Replace the stock method; return why not, or None when done (twice is fine)."""
    global _stock
    if _stock is not None:
        return None
    try:
        from vllm.v1.engine.logprobs import LogprobsProcessor
    except ImportError as error:
        return f"vLLM has no LogprobsProcessor ({error})"
    stock = getattr(LogprobsProcessor, "_update_prompt_logprobs", None)
    if stock is None:
        return "vLLM's LogprobsProcessor has no _update_prompt_logprobs"
    parameters = list(inspect.signature(stock).parameters)
    if parameters != ["self", "prompt_logprobs_tensors"]:
        return f"vLLM's _update_prompt_logprobs takes {parameters}"
    _stock = stock

    def keep_arrays(self: Any, prompt_logprobs_tensors: Any) -> None:
        """Keep this request's tensors as numpy arrays; requests that want text take the stock path."""
        if self.tokenizer is not None:
            stock(self, prompt_logprobs_tensors)
            return
        ids, logprobs = prompt_logprobs_tensors[:2]
        kept = PromptArrays(ids.numpy().astype(np.int32), logprobs.numpy().astype(np.float32))
        earlier = self.prompt_logprobs
        if isinstance(earlier, PromptArrays):  # a version that hands over chunk by chunk
            kept = PromptArrays(
                np.concatenate([earlier.ids, kept.ids]), np.concatenate([earlier.logprobs, kept.logprobs])
            )
        self.prompt_logprobs = kept

    LogprobsProcessor._update_prompt_logprobs = keep_arrays
    return None


def uninstall() -> None:
    """Put the stock method back."""
    global _stock
    if _stock is not None:
        from vllm.v1.engine.logprobs import LogprobsProcessor

        LogprobsProcessor._update_prompt_logprobs = _stock
        _stock = None


def columns_of(prompt_logprobs: Any, num_columns: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return ids and natural logs [T - 1, W] of a finished request, whichever container it came in.

    Raises:
        EngineError: rows are missing or have another width.
    """
    if isinstance(prompt_logprobs, PromptArrays):
        ids, logprobs = prompt_logprobs.ids, prompt_logprobs.logprobs
    elif hasattr(prompt_logprobs, "start_indices"):
        ids = np.asarray(prompt_logprobs.token_ids, dtype=np.int32)
        logprobs = np.asarray(prompt_logprobs.logprobs, dtype=np.float32)
        rows = len(prompt_logprobs) - 1
        if ids.size != rows * num_columns:
            raise EngineError(
                f"vLLM returned {ids.size} log-probabilities for {rows} positions; expected {num_columns} each"
            )
        ids, logprobs = ids.reshape(rows, num_columns), logprobs.reshape(rows, num_columns)
    else:
        raise EngineError(
            f"vLLM returned prompt log-probabilities as {type(prompt_logprobs).__name__}; expected arrays or flat lists"
        )
    if ids.shape[1] != num_columns:
        raise EngineError(f"vLLM returned {ids.shape[1]} log-probabilities per position; expected {num_columns}")
    return ids, logprobs

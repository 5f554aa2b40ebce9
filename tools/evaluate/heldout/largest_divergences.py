"""Held-out positions of the largest KL between student and teacher, in context, with what each would say.

While rows are measured, the largest few positions are kept in a heap; only their rows go through the model once more,
to name the student's tokens. Cost: a forward pass for each of at most `MOST_POSITIONS` rows, at the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shared.cache.cache import Cache
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.tokens.tokenizer_file import plain_tokenizer
from student_train.student.rows_alone import run_rows_alone
from student_train.student.student_head import body_of, head_of

MOST_POSITIONS = 12
MOST_PER_ROW = 2
"""So that one strange row does not fill the list."""
TOKENS_BEFORE, TOKENS_AFTER = 48, 8
ALTERNATIVES = 5

Place = tuple[int, int]
"""Cache and row."""


def largest_of_row(kl_nats: np.ndarray) -> tuple[tuple[float, int], ...]:
    """Return (KL in nats, position) of a row's largest divergences [S], largest first."""
    order = np.argsort(-kl_nats, kind="stable")[:MOST_PER_ROW]
    return tuple((float(kl_nats[s]), int(s)) for s in order)


@dataclass(slots=True)
class LargestDivergences:
    """The largest divergences seen so far."""

    heap: list[tuple[float, int, int, int]] = field(default_factory=list)
    """(KL, cache, row, position), smallest first."""

    def add(self, place: Place, largest: Sequence[tuple[float, int]]) -> None:
        """Consider a row's largest positions."""
        for kl, position in largest:
            entry = (kl, -place[0], -place[1], -position)  # of equals the first place wins, whichever came first
            if len(self.heap) < MOST_POSITIONS:
                heapq.heappush(self.heap, entry)
            else:
                heapq.heappushpop(self.heap, entry)

    def described(self, model: Any, caches: Sequence[Cache], vocab_size: int) -> list[dict[str, Any]]:
        """Return source, KL, text around, and both sides' most probable tokens with probabilities, by falling KL."""
        writers = [_decoder(cache) for cache in caches]
        found = []
        for kl, cache, row, position in sorted(self.heap, reverse=True):
            logprobs = _student_logprobs(model, caches[-cache][-row], -position, vocab_size)
            found.append({"kl_nats": kl, **_described(caches[-cache][-row], -position, logprobs, writers[-cache])})
        return found


def _student_logprobs(model: Any, row: Any, position: int, vocab_size: int) -> np.ndarray:
    """Return the student's log-probabilities [V] at one position of a row."""
    head = head_of(model, vocab_size)
    device = model.get_input_embeddings().weight.device
    token_ids = torch.from_numpy(row.token_ids.astype(np.int64))[None].to(device)
    with torch.no_grad():
        states = run_rows_alone(body_of(model), token_ids, torch.arange(token_ids.shape[1], device=device)[None])
        state = states[0, int(row.predictor_index()[position])]
        logprobs: np.ndarray = torch.log_softmax(head.logits(state).double(), 0).cpu().numpy()
        return logprobs


def _described(row: Any, position: int, logprobs: np.ndarray, write: Any) -> dict[str, Any]:
    at = int(row.predictor_index()[position]) + 1
    targets = row.targets
    start, end = (int(offset) for offset in targets.offsets()[position : position + 2])
    head = slice(start, min(end, start + ALTERNATIVES))
    teacher = zip(targets.ids[head].tolist(), np.exp(targets.logprobs[head].astype(np.float64)).tolist(), strict=True)
    best = np.argsort(-logprobs, kind="stable")[:ALTERNATIVES]
    label = int(row.token_ids[at])
    return {
        "source": row.source,
        "before": write(row.token_ids[max(0, at - TOKENS_BEFORE) : at].tolist()),
        "token": write([label]),
        "after": write(row.token_ids[at + 1 : at + 1 + TOKENS_AFTER].tolist()),
        "teacher": [[write([i]), probability] for i, probability in teacher],
        "student": [[write([int(i)]), float(np.exp(logprobs[i]))] for i in best],
        "token_probability": {
            "teacher": float(np.exp(np.float64(targets.label_logprobs[position]))),
            "student": float(np.exp(logprobs[label])),
        },
    }


def _decoder(cache: Cache) -> Any:
    """Return how to write token ids: the cache's tokenizer, special tokens included."""
    tokenizer = plain_tokenizer(read_tokenizer_files(cache.path)["tokenizer.json"], f"the tokenizer of {cache.path}")
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)

"""An engine whose answers and scores are pure functions of the request, returned out of order: for the builder's logic
only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from shared.payload.targets import SparseTargets
from shared.recipe.recipe import Capture, Teacher
from teacher_cache.engines.protocol import Generated, Scored
from tests.tiny_models import VOCAB_SIZE

END_ID = 2


class FakeEngine:
    """Holds `window` requests, returns them in a shuffled order."""

    vocab_size = VOCAB_SIZE
    tokenizer = None

    def __init__(self, teacher: Teacher, capture: Capture, window: int = 7) -> None:
        self.capture = capture
        self.max_model_len = teacher.max_model_len
        self.window = window
        self.closed = 0
        self.generated: list[tuple] = []
        self.scored = 0
        self.on_result: Callable[[], None] = lambda: None
        self.answer: Callable[[np.random.Generator], tuple[list[int], str]] = self.random_answer

    def random_answer(self, rng: np.random.Generator) -> tuple[list[int], str]:
        length = int(rng.integers(1, 12))
        ids = rng.integers(3, VOCAB_SIZE, length).tolist()
        return (ids, "length") if length == 11 else ([*ids, END_ID], "stop")

    def _shuffled(self, requests) -> Iterator:
        held, order = [], random.Random(len(self.generated) + self.scored)
        for request in requests:
            held.append(request)
            if len(held) >= self.window:
                yield held.pop(order.randrange(len(held)))
        order.shuffle(held)
        yield from held

    def generate(self, requests, settings) -> Iterator[Generated]:
        for request in self._shuffled(requests):
            self.generated.append((request.tag, request.seed))
            ids, reason = self.answer(np.random.default_rng([request.seed, *request.token_ids]))
            self.on_result()
            yield Generated(request.tag, ids[: settings.max_new_tokens], reason)

    def score(self, requests) -> Iterator[Scored]:
        for request in self._shuffled(requests):
            self.scored += 1
            self.on_result()
            yield Scored(
                request.tag, fake_targets(request.token_ids, request.spans, self.capture.k, self.capture.temperatures)
            )

    def provenance(self) -> dict:
        return {"engine": "fake"}

    def close(self) -> None:
        self.closed += 1


def fake_targets(
    token_ids: np.ndarray, spans: np.ndarray, k: int, temperatures: tuple[float, ...] = (1.0,)
) -> SparseTargets:
    """Geometric probabilities over ids that follow from the token before, as if every entry had one."""
    positions = np.concatenate([np.arange(start, end) for start, end in spans])
    before = token_ids[positions - 1]
    ids = ((before[:, None] + 1 + np.arange(k)) % VOCAB_SIZE).astype(np.int32)
    logprobs = np.tile(-0.7 * np.arange(1, k + 1, dtype=np.float32), (len(positions), 1))
    head = {t: -np.expm1(-0.7 * k / t) * (np.exp(-0.7 / t) / -np.expm1(-0.7 / t)) for t in temperatures}
    tail = [
        np.log1p(-min(head[t], 0.999)) if t > 1 else np.log1p(-np.exp(logprobs[0].astype(np.float64)).sum())
        for t in temperatures
    ]
    labels = token_ids[positions]
    inside = (labels[:, None] == ids).argmax(1)
    hit = (labels[:, None] == ids).any(1)
    label_logprobs = np.where(hit, logprobs[np.arange(len(positions)), inside], -12.0).astype(np.float32)
    return SparseTargets(
        counts=np.full(len(positions), k, np.int32),
        ids=ids.ravel(),
        logprobs=logprobs.ravel(),
        label_logprobs=label_logprobs,
        tail_logmass=np.tile(np.array(tail, np.float32), (len(positions), 1)),
        temperatures=temperatures,
    )

"""Requests in batches of similar length, never across a unit, so that a continued build computes the same bytes.

Rows share a batch only where their model lets them: rotations that follow the longest row, and layers that padding
reaches, want rows of one class of length. Cost: a sort per unit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

from teacher_cache.engines.protocol import GenerateRequest, ScoreRequest

Request = TypeVar("Request", GenerateRequest, ScoreRequest)


def length_batches(
    requests: Iterable[Request],
    extra_tokens: int,
    batch_tokens: int,
    class_of: Callable[[int], Hashable] = lambda num_tokens: (),
) -> Iterator[list[Request]]:
    """Cut requests into batches by length: one request, or at most `batch_tokens` padded tokens.

    Args:
        requests: requests of one unit follow one another.
        extra_tokens: tokens that each row may grow by.
        batch_tokens: padded tokens of a batch.
        class_of: tokens of a row -> its class, which rows of a batch share; None for a row that must be alone.
    """
    for _, members in groupby(requests, key=lambda request: request.unit):
        batch: list[Request] = []
        for request in sorted(members, key=lambda request: -len(request.token_ids)):
            padded = (len(batch) + 1) * (len(batch[0].token_ids if batch else request.token_ids) + extra_tokens)
            kind = class_of(len(request.token_ids))
            if batch and (padded > batch_tokens or kind is None or kind != class_of(len(batch[0].token_ids))):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

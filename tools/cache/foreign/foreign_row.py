"""A row as others store it: its tokens, and for some of them the entries that the teacher named.

Shape letters: T tokens, S tokens that have entries, K most entries of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError
from shared.schema import MAX_ENTRIES_PER_ROW, MAX_TOKENS_PER_ROW


@dataclass(frozen=True, slots=True, eq=False)
class ForeignRow:
    """One document of a foreign cache.

    `token_ids=[5, 6, 7, 8]`, `predicted=[2, 3]` and `ids=[[7, 1], [9, 8]]`: before the token 7 the teacher named 7 and
    1, before the token 8 it named 9 and 8.
    """

    where: str
    """File and row, for messages."""
    token_ids: NDArray[np.int64]
    """[T]."""
    predicted: NDArray[np.int64]
    """[S] ascending indices, from 1, of the tokens whose distribution is known."""
    ids: NDArray[np.int64]
    """[S, K] token ids."""
    logprobs: NDArray[np.float64]
    """[S, K] natural logs; -inf where there is no entry."""
    label_logprobs: NDArray[np.float64] | None = None
    """[S] of the tokens themselves where the format stores them, NaN where it does not; None: nowhere."""
    prompt: str | None = None
    """None: what the tokens before the first predicted one spell."""
    question: str | None = None
    """First user turn, whose rows are held out together; None: the prompt."""
    response: str | None = None
    """None: what the predicted tokens spell."""
    source: str | None = None
    """None: the one that the user named."""
    finish_reason: str = "given"

    def entries(self, kept: NDArray[np.bool_] | slice) -> ForeignRow:
        """Return the row with some of the S tokens' entries alone."""
        labels = None if self.label_logprobs is None else self.label_logprobs[kept]
        return replace(
            self,
            predicted=self.predicted[kept],
            ids=self.ids[kept],
            logprobs=self.logprobs[kept],
            label_logprobs=labels,
        )


class ForeignReader(Protocol):
    """Reads one format."""

    form: str
    """Its name, as layers and reports say it."""
    tail: str
    """Kind of tail that its numbers give: derived or unknown."""
    labels: str
    """Labels whose log-probability is known: all or head."""
    k: int
    """Most entries of a token."""
    vocab_size: int | None
    """Entries of the teacher's head where the format says so."""
    notes: dict[str, object]
    """What was decided while reading, for the provenance and the summary."""

    def rows(self) -> Iterator[ForeignRow]:
        """Yield every document.

        Raises:
            DamagedError: a file contradicts its format.
        """


def check_entries(num_positions: int, width: int, where: str) -> None:
    """Refuse a row's entries by their number, before there are arrays of them.

    Raises:
        DamagedError: with the place.
    """
    if num_positions * width > MAX_ENTRIES_PER_ROW:
        raise DamagedError(f"{where} has {num_positions:,} positions of up to {width:,} entries; too many")


def check_row(row: ForeignRow) -> None:
    """Refuse a row whose arrays contradict each other or are too large.

    Raises:
        DamagedError: with the place.
    """
    num_tokens, (num_predicted, width) = len(row.token_ids), row.ids.shape
    check_entries(num_predicted, width, row.where)
    if num_tokens > MAX_TOKENS_PER_ROW:
        raise DamagedError(f"{row.where} has {num_tokens:,} tokens; at most {MAX_TOKENS_PER_ROW:,} are taken")
    if row.logprobs.shape != row.ids.shape or len(row.predicted) != num_predicted:
        raise DamagedError(f"{row.where} has {row.ids.shape} ids and {row.logprobs.shape} log-probabilities")
    if num_tokens and int(row.token_ids.min()) < 0:
        raise DamagedError(f"{row.where} has a token id below 0, or above what 63 bits hold")
    edges = row.predicted
    if num_predicted and (edges[0] < 1 or edges[-1] >= num_tokens or bool((np.diff(edges) < 1).any())):
        raise DamagedError(f"{row.where} has entries for tokens that it does not have")


def pieces_of(row: ForeignRow, starts: NDArray[np.bool_]) -> Iterator[ForeignRow]:
    """Yield the documents of a packed row, begun where `starts` [T] says, without entries for their first tokens."""
    cuts = [0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(starts)]
    for first, last in pairwise(cuts):
        inside = row.entries(slice(*np.searchsorted(row.predicted, [first + 1, last])))
        where = f"{row.where} tokens {first}-{last - 1}" if len(cuts) > 2 else row.where
        yield replace(inside, where=where, token_ids=row.token_ids[first:last], predicted=inside.predicted - first)

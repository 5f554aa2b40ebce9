"""A prompt with its answer, before and after the disk.

The position rule lives here as two methods: position s of a row is predicted by the hidden state of the token before
the s-th token of the concatenated spans (`predictor_index`), and that token is its label (`labels`). Cost: vectorised.

Shape letters: T tokens of a row, n spans, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared.keys import KEY_BYTES, content_key
from shared.schema import FINISH_REASONS, MAX_SPANS_PER_ROW, MAX_TOKENS_PER_PART, MAX_TOKENS_PER_ROW, SEQUENCES


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRow:
    """One row of sequences/."""

    key: bytes
    """`content_key` of token_ids and spans."""
    row_key: bytes
    group_key: bytes
    source: str
    prompt: str
    response: str
    reference: str | None
    token_ids: NDArray[np.int32]
    """[T] prompt and answer."""
    spans: NDArray[np.int32]
    """[n, 2] start and exclusive end of supervised tokens; ascending, disjoint, start >= 1."""
    finish_reason: str
    """stop: the answer ended itself; length: it was cut; given: it came with the data."""

    @property
    def num_positions(self) -> int:
        """S, the number of supervised positions."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def supervised_index(self) -> NDArray[np.int32]:
        """Return [S] int32 index in `token_ids` of each supervised token."""
        return spans_index(self.spans)

    def predictor_index(self) -> NDArray[np.int32]:
        """Return [S] int32 index of the hidden state that predicts each supervised token: the token before it."""
        return self.supervised_index() - np.int32(1)

    def labels(self) -> NDArray[np.int32]:
        """Return [S] int32 ids of the supervised tokens."""
        return self.token_ids[self.supervised_index()]


def spans_index(spans: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return [S] int32 indices that [n, 2] spans cover, one span after another."""
    lengths = spans[:, 1] - spans[:, 0]
    ends = np.cumsum(lengths, dtype=np.int32)
    shift = spans[:, 0] - (ends - lengths)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int32) + np.repeat(shift, lengths)


def make_row(
    *,
    row_key: bytes,
    group_key: bytes,
    source: str,
    prompt: str,
    response: str,
    reference: str | None,
    token_ids: Sequence[int] | NDArray[np.int32],
    spans: Sequence[tuple[int, int]] | NDArray[np.int32],
    finish_reason: str,
) -> SequenceRow:
    """Build a row from plain lists, with its content key.

    Raises:
        ValueError: spans outside the tokens or an id that is negative.
    """
    tokens = np.asarray(token_ids, dtype=np.int32)
    pairs = np.asarray(spans, dtype=np.int32).reshape(-1, 2)
    row = SequenceRow(
        content_key(tokens, pairs),
        row_key,
        group_key,
        source,
        prompt,
        response,
        reference,
        tokens,
        pairs,
        finish_reason,
    )
    problem = row_problem(row)
    if problem:
        raise ValueError(problem)
    return row


def row_problem(row: SequenceRow, vocab_size: int | None = None) -> str | None:
    """Say what contradicts the format in a row, if anything; the content key is not recomputed."""
    if row.token_ids.ndim != 1 or len(row.token_ids) > MAX_TOKENS_PER_ROW:
        return f"a row has at most {MAX_TOKENS_PER_ROW} tokens, got shape {row.token_ids.shape}"
    if any(len(key) != KEY_BYTES for key in (row.key, row.row_key, row.group_key)):
        return f"every key has {KEY_BYTES} bytes"
    if row.finish_reason not in FINISH_REASONS:
        return f"finish_reason {row.finish_reason!r} is none of {', '.join(FINISH_REASONS)}"
    return token_ids_problem(row.token_ids, vocab_size) or spans_problem(row.spans, len(row.token_ids))


def token_ids_problem(token_ids: NDArray[np.int32], vocab_size: int | None = None) -> str | None:
    """Say which of a row's token ids is negative or outside the vocabulary, if any."""
    if not len(token_ids):
        return None
    if int(token_ids.min()) < 0:
        return f"token id {int(token_ids.min())} is negative"
    if vocab_size is not None and int(token_ids.max()) >= vocab_size:
        return f"token id {int(token_ids.max())} lies outside the vocabulary of {vocab_size}"
    return None


def spans_problem(spans: NDArray[np.int32], num_tokens: int) -> str | None:
    """Say what is wrong with [n, 2] spans over `num_tokens` tokens, if anything."""
    if spans.ndim != 2 or spans.shape[1] != 2 or len(spans) > MAX_SPANS_PER_ROW:
        return f"spans must be [n, 2] with n <= {MAX_SPANS_PER_ROW}, got {spans.shape}"
    edges = spans.astype(np.int64).ravel()
    if len(edges) and (edges[0] < 1 or edges[-1] > num_tokens or bool((edges[1:] < edges[:-1]).any())):
        return f"spans must ascend within [1, {num_tokens}] without overlap, got {spans[:4].tolist()}"
    return None


def rows_to_table(rows: Sequence[SequenceRow]) -> pa.Table:
    """Return rows, which do not contradict the format, as a table of the SEQUENCES schema.

    Raises:
        ValueError: the rows hold too many tokens for one part.
    """
    lengths = [len(row.token_ids) for row in rows]
    if sum(lengths) > MAX_TOKENS_PER_PART:
        raise ValueError(f"a part holds at most {MAX_TOKENS_PER_PART} tokens, got {sum(lengths)}; use smaller parts")
    columns: dict[str, pa.Array] = {}
    for name in ("key", "row_key", "group_key", "source", "prompt", "response", "reference", "finish_reason"):
        columns[name] = pa.array([getattr(row, name) for row in rows], type=SEQUENCES.field(name).type)
    flat = np.concatenate([row.token_ids for row in rows]) if rows else np.zeros(0, np.int32)
    columns["token_ids"] = _lists(pa.array(flat, pa.int32()), lengths, "token_ids")
    edges = np.concatenate([row.spans.ravel() for row in rows]) if rows else np.zeros(0, np.int32)
    pairs = pa.FixedSizeListArray.from_arrays(
        pa.array(edges, pa.int32()), type=SEQUENCES.field("spans").type.value_type
    )
    columns["spans"] = _lists(pairs, [len(row.spans) for row in rows], "spans")
    return pa.Table.from_arrays([columns[name] for name in SEQUENCES.names], schema=SEQUENCES)


def _lists(values: pa.Array, lengths: Sequence[int], column: str) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=SEQUENCES.field(column).type)

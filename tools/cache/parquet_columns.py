"""Columns of an exported part, for tools that know Parquet and nothing of Decant.

One row per row of the cache. Per position s: `ids[s]` and `logprobs[s]` are the head by descending probability,
`label_logprobs[s]` the log-probability of the token that follows, `tail_logmass_T[s]` the log of the mass outside the
head at temperature T, `draw_ids_T[s]` and `draw_multiplicities_T[s]` what was drawn from outside it. All logs are
natural, under the full softmax at temperature 1 but for the tails. Position s predicts the s-th token of the
concatenated spans (docs/format.md).

Shape letters: R rows of a batch, S positions of all of them, N head entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.identity.identity import LayerIdentity
from shared.payload.targets import Draws, SparseTargets
from shared.schema import SEQUENCES

METADATA_FILE = "decant-export.json"
RECORD_KEY = b"decant"
EXPORT_FORMAT = 1
PLAIN = ("key", "row_key", "group_key", "source", "prompt", "response", "reference", "finish_reason")
_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def export_schema(layer: LayerIdentity | None) -> pa.Schema:
    """Return the columns of an export of a layer; without one those of sequences alone."""
    columns = [SEQUENCES.field(name) for name in PLAIN]
    columns += [pa.field(name, _INTS, nullable=False) for name in ("token_ids", "span_starts", "span_ends")]
    if layer is not None:
        columns += [
            pa.field("num_positions", pa.int32(), nullable=False),
            pa.field("teacher_nll_nats", pa.float64(), nullable=False),
            pa.field("ids", pa.list_(_INTS), nullable=False),
            pa.field("logprobs", pa.list_(_FLOATS), nullable=False),
            pa.field("label_logprobs", _FLOATS, nullable=False),
        ]
        columns += [pa.field(f"tail_logmass_{t!r}", _FLOATS, nullable=False) for t in layer.temperatures]
        drawn = itertools.product(layer.temperatures if layer.draws else (), ("draw_ids", "draw_multiplicities"))
        columns += [pa.field(f"{name}_{t!r}", pa.list_(_INTS), nullable=False) for t, name in drawn]
    return pa.schema(columns)


def nested(rows: Sequence[np.ndarray], counts: Sequence[NDArray[np.int32]], kind: pa.DataType) -> pa.Array:
    """Return [R] lists of lists of `rows`, flat arrays cut by `counts` per position."""
    inner = pa.ListArray.from_arrays(_offsets(np.concatenate(counts)), pa.array(np.concatenate(rows)), type=kind)
    return pa.ListArray.from_arrays(_offsets(np.asarray([len(c) for c in counts])), inner, type=pa.list_(kind))


def flat(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Return [R] lists of `rows`."""
    values = pa.array(np.concatenate(rows), type=kind.value_type)
    return pa.ListArray.from_arrays(_offsets(np.asarray([len(row) for row in rows])), values, type=kind)


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32()
    )  # refuses what 31 bits cannot hold


def targets_columns(targets: Sequence[SparseTargets]) -> dict[str, pa.Array]:
    """Return the columns of at least one row's targets by name."""
    counts = [row.counts for row in targets]
    columns = {
        "num_positions": pa.array([row.num_positions for row in targets], pa.int32()),
        "ids": nested([row.ids for row in targets], counts, _INTS),
        "logprobs": nested([row.logprobs for row in targets], counts, _FLOATS),
        "label_logprobs": flat([row.label_logprobs for row in targets], _FLOATS),
    }
    for j, t in enumerate(targets[0].temperatures):
        columns[f"tail_logmass_{t!r}"] = flat([row.tail_logmass[:, j] for row in targets], _FLOATS)
    for j, t in enumerate(targets[0].temperatures if targets[0].draws else ()):
        drawn = [row.draws[j] for row in targets]
        columns[f"draw_ids_{t!r}"] = nested([d.ids for d in drawn], [d.counts for d in drawn], _INTS)
        columns[f"draw_multiplicities_{t!r}"] = nested(
            [d.multiplicities for d in drawn], [d.counts for d in drawn], _INTS
        )
    return columns


def lists_in(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """Return how deep lists of a type are nested, and the type of the values in them.

    >>> lists_in(pa.list_(pa.large_list(pa.int8())))
    (2, DataType(int8))
    """
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth, kind


class Lists:
    """A column of lists, or of lists of lists, cut into rows."""

    def __init__(self, column: pa.Array) -> None:
        """Take a column without nulls.

        Raises:
            ValueError: a value is null.
        """
        self._rows = _ends(column)
        values = pc.list_flatten(column)
        self._positions: NDArray[np.int64] | None = None
        if pa.types.is_list(values.type):
            self._positions = _ends(values)
            values = pc.list_flatten(values)
        if values.null_count:
            raise ValueError("a list holds a null")
        self._values = values.to_numpy(zero_copy_only=False)

    def counts(self, i: int) -> NDArray[np.int32]:
        """Return [S] lengths of row i's inner lists."""
        assert self._positions is not None
        return np.diff(self._positions[self._rows[i] : self._rows[i + 1] + 1]).astype(np.int32)

    def values(self, i: int) -> np.ndarray:
        """Return the values of row i, flat."""
        start, end = self._rows[i], self._rows[i + 1]
        if self._positions is not None:
            start, end = self._positions[start], self._positions[end]
        values: np.ndarray = self._values[start:end]
        return values


def _ends(column: pa.Array) -> NDArray[np.int64]:
    if column.null_count:
        raise ValueError("a list is null")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def read_targets(columns: dict[str, Lists], i: int, temperatures: tuple[float, ...], *, draws: bool) -> SparseTargets:
    """Return the targets of row i.

    Raises:
        ValueError: two columns disagree about how many entries a position has.
    """
    counts = columns["ids"].counts(i)
    drawn = []
    for t in temperatures if draws else ():
        ids, multiplicities = columns[f"draw_ids_{t!r}"], columns[f"draw_multiplicities_{t!r}"]
        if not np.array_equal(ids.counts(i), multiplicities.counts(i)):
            raise ValueError(f"draw_ids_{t!r} and draw_multiplicities_{t!r} differ in length")
        drawn.append(Draws(ids.counts(i), ids.values(i), multiplicities.values(i)))
    tails = [columns[f"tail_logmass_{t!r}"].values(i) for t in temperatures]
    if not np.array_equal(counts, columns["logprobs"].counts(i)) or any(len(tail) != len(counts) for tail in tails):
        raise ValueError("ids, logprobs and tail_logmass differ in length")
    return SparseTargets(
        counts,
        columns["ids"].values(i),
        columns["logprobs"].values(i),
        columns["label_logprobs"].values(i),
        np.stack(tails, axis=1) if tails else np.zeros((0, 0), np.float32),
        temperatures,
        tuple(drawn),
    )

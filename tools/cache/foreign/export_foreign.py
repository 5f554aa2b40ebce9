"""`decant cache export --format axolotl|distillkit`: a cache as the KD sets that other trainers read.

- axolotl: `input_ids`, `labels`, `attention_mask`, `target_token_ids`, `target_logprobs`, `target_mask`. Row i is about
  token i + 1, as Axolotl's loss now reads it; values are divided by their sum, at temperature 1 (kd_temperature: 1), so
  the tail is lost.
- distillkit: `input_ids`, `labels`, `compressed_logprobs`, `bytepacked_indices` and `compression_config.yaml`: every
  value as it is (float32). Row i is the distribution after token i. Where the cache supervises nothing, or has no head
  (within a teacher's token of a translated cache), its labels are -100, and the row, which DistillKit needs, names the
  token of the text alone; heads shorter than k are filled with entries of no mass.

Draws, hidden layers and tails at other temperatures have no place there and are left out. One file per part with rows,
written beside OUT_DIR and renamed; memory: one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.atomic import write_atomic
from shared.cache.cache import Cache, Row
from shared.errors import CacheError, UsageError
from shared.identity.identity import LayerIdentity
from shared.parts.cache_files import read_json
from shared.parts.records import json_bytes
from tools.cache.foreign.bit_packing import pack
from tools.cache.foreign.distillkit import SETTINGS_FILE, Compression, index_bits
from tools.cache.parquet_columns import flat, nested
from tools.cache.parquet_export import exported, write_parquet
from tools.cache.staged_directory import refuse_existing, staged

SOURCE_FILE = "source.json"
NO_MASS = -10_000.0
"""Log-probability of entries that fill a row of DistillKit; finite, since 0 x -inf is no number in its losses."""
_MASKED = -1e9
"""Log-probability of entries that Axolotl's mask leaves out."""
_IGNORED = -100
"""Label of a token that is not supervised."""


def export_foreign(
    path: Path,
    out: Path,
    form: str,
    targets: str | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write a cache as others read it, `form` being axolotl or distillkit; other arguments and result as for
    `export_cache`.

    Raises:
        UsageError: the layer has no heads, or none that the format could hold.
        CacheError: there is no row, rows are not scored, something is damaged, or `out` is something else.
    """
    cache = Cache.open(path, targets)
    if not len(cache):
        raise CacheError(f"{path} has no rows, and {form} has no place for what else it says; export as parquet")
    layer = cache.layer
    if layer is None or layer.k == 0:
        raise UsageError(
            f"{path}: {form} holds heads, and {cache.layer_name or 'the cache'} has none; export as parquet"
        )
    if form == "distillkit" and layer.tail == "unknown":
        raise UsageError(
            f"{path}: distillkit holds log-probabilities of the full softmax, and {cache.layer_name} has heads right "
            "up to a factor; export as axolotl or parquet"
        )
    proof = out / SOURCE_FILE
    said = {"cache_id": cache.cache_id, "format": form, "layer": layer.to_json()}
    existed = proof.is_file() and read_json(proof) == said
    if not existed:
        refuse_existing(out, "an export of this cache as it is now")
        with staged(out, f"exporting-{form}", cache.cache_id, proof) as staging:
            for number, part in enumerate(cache.parts()):
                file = staging / f"data_{number}.parquet"
                if part.rows and not file.exists():
                    _write_part(cache, part.rows, layer, form, file)
                advance(len(part.rows))
            if form == "distillkit":
                write_atomic(staging / SETTINGS_FILE, json_bytes(_settings(layer).model_dump(mode="json")), "sequences")
            write_atomic(staging / SOURCE_FILE, json_bytes(said), "cache_json")
    return exported(cache, out, existed=existed)


def _settings(layer: LayerIdentity) -> Compression:
    """Return DistillKit's settings for values as they are."""
    k = _width(layer)
    return Compression(
        d=layer.vocab_size, k=k, exact_k=k, polynomial_terms=None, residual_bins=[], delta_encoding=False
    )


def _width(layer: LayerIdentity) -> int:
    """Return how many entries every position has; each names another token."""
    return min(layer.most_entries, layer.vocab_size)


def _write_part(cache: Cache, rows: range, layer: LayerIdentity, form: str, file: Path) -> None:
    """Write rows of a cache, one at least, as one Parquet file."""
    columns_of = _axolotl if form == "axolotl" else _distillkit

    def fill(target: BinaryIO) -> None:
        """Write row after row."""
        batches = (pa.RecordBatch.from_pydict(columns_of(cache[index], layer)) for index in rows)
        first = next(batches)
        with pq.ParquetWriter(target, first.schema, compression="zstd") as writer:
            for batch in itertools.chain((first,), batches):
                writer.write_batch(batch, row_group_size=len(batch))

    write_parquet(file, fill, 0)


def _axolotl(row: Row, layer: LayerIdentity) -> Mapping[str, pa.Array]:
    assert row.targets is not None
    counts = row.targets.counts
    width = max(int(counts.max(initial=0)), 1)
    num_tokens = len(row.token_ids)
    ids = np.broadcast_to(np.arange(width, dtype=np.int32), (num_tokens, width)).copy()
    logprobs = np.full((num_tokens, width), _MASKED, np.float32)
    mask = np.zeros((num_tokens, width), np.int8)
    for place, head_ids, head in _heads(row):
        ids[place, : len(head)] = head_ids
        logprobs[place, : len(head)] = head - np.log(np.exp(head.astype(np.float64)).sum())
        mask[place, : len(head)] = 1
    return {
        "input_ids": _one(row.token_ids),
        "labels": _one(_labels(row)),
        "attention_mask": _one(np.ones(num_tokens, np.int8)),
        "target_token_ids": _grid(ids),
        "target_logprobs": _grid(logprobs),
        "target_mask": _grid(mask),
    }


def _distillkit(row: Row, layer: LayerIdentity) -> Mapping[str, pa.Array]:
    num_tokens, k = len(row.token_ids), _width(layer)
    following = np.append(row.token_ids[1:], row.token_ids[-1:])
    ids = np.repeat(following[:, None].astype(np.int64), k, axis=1)
    logprobs = np.full((num_tokens, k), NO_MASS, np.float32)
    counts = np.ones(num_tokens, np.int64)
    logprobs[:, 0] = 0.0
    labels, known = _labels(row), np.zeros(num_tokens + 1, np.bool_)
    for place, head_ids, head in _heads(row):
        known[place + 1] = True
        ids[place, : len(head)], logprobs[place, : len(head)] = head_ids, head
        counts[place] = len(head)
    _fill_up(ids, counts, layer.vocab_size)
    values = logprobs.astype("<f4").view(np.uint8).reshape(num_tokens, -1)
    return {
        "input_ids": _one(row.token_ids.astype(np.uint64)),
        "labels": _one(np.where(known[:num_tokens], labels, _IGNORED)),
        "compressed_logprobs": _grid(values),
        "bytepacked_indices": _grid(pack(ids, index_bits(layer.vocab_size))),
    }


def _heads(row: Row) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
    """Yield (index of the token before, ids, log-probabilities) of every supervised position that has a head."""
    assert row.targets is not None
    offsets = row.targets.offsets().tolist()
    for s, place in enumerate(row.predictor_index().tolist()):
        head = slice(offsets[s], offsets[s + 1])
        if head.start < head.stop:
            yield place, row.targets.ids[head], row.targets.logprobs[head]


def _fill_up(ids: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int) -> None:
    """Put the lowest ids that a position does not name after those that it does."""
    num_tokens, k = ids.shape
    width = min(2 * k, vocab_size)
    named = np.zeros((num_tokens, width), np.bool_)
    place = np.arange(k) < counts[:, None]
    rows, columns = np.nonzero(place & (ids < width))
    named[rows, ids[rows, columns]] = True
    free = np.argsort(named, axis=1, kind="stable")
    for t in np.flatnonzero(counts < k):
        ids[t, counts[t] :] = free[t, : k - counts[t]]


def _labels(row: Row) -> NDArray[np.int64]:
    labels = np.full(len(row.token_ids), _IGNORED, np.int64)
    labels[row.supervised_index()] = row.labels()
    return labels


def _one(values: np.ndarray) -> pa.Array:
    """Return a column of one row: a list."""
    return flat([values], pa.list_(pa.from_numpy_dtype(values.dtype)))


def _grid(values: np.ndarray) -> pa.Array:
    """Return a column of one row: a list of lists of one length."""
    counts = np.full(len(values), values.shape[1], np.int32)
    return nested([values.ravel()], [counts], pa.list_(pa.from_numpy_dtype(values.dtype)))

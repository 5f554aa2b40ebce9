"""Three keys, three questions: which prompt, which row, which content.

- `group_key`: which rows belong together? It decides the hold-out, so that samples of one prompt never fall on both
  sides.
- `row_key`: what does a later build skip? Unique within a cache.
- `content_key`: is this the content that I think it is? Checked at every read.

Every key is an xxh3-128 digest: 16 bytes, big-endian. Cost: far below the time to read the hashed text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

KEY_BYTES = 16
_HELDOUT_SEED = 0x6465_6361_6E74
_HASH64_RANGE = 2.0**64


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8; equal values give equal bytes.

    Raises:
        ValueError: the value holds a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def group_key(prompt_text: str) -> bytes:
    """Return the 16-byte key of a source prompt's text (of the whole text where the format is `text`)."""
    return xxhash.xxh3_128_digest(prompt_text.encode("utf-8", "surrogatepass"))


def row_key(group: bytes, sampling: Mapping[str, Any] | None, sample_index: int, answer: str | None) -> bytes:
    """Return the 16-byte key of one row: its group with the sampling settings and sample index, or with the given
    answer.

    Args:
        group: the row's `group_key`.
        sampling: JSON-like settings that an answer is drawn with; None where the answer was given.
        sample_index: which sample of the group, from 0.
        answer: the given answer's text; None where it is generated. An answer that was given decides alone, with the
            index.

    Raises:
        ValueError: both or neither of `sampling` and `answer` are given, or `group` is not a key.
    """
    if len(group) != KEY_BYTES:
        raise ValueError(f"a group_key has {KEY_BYTES} bytes, got {len(group)}")
    if (sampling is None) == (answer is None):
        raise ValueError("a row is either sampled (sampling) or given (answer), exactly one of them")
    if answer is not None:
        detail = b"answer" + xxhash.xxh3_128_digest(answer.encode("utf-8", "surrogatepass"))
    else:
        detail = b"sampling" + canonical_json(dict(sampling or {}))
    return xxhash.xxh3_128_digest(group + sample_index.to_bytes(4, "big") + detail)


def content_key(token_ids: NDArray[np.int32], spans: NDArray[np.int32]) -> bytes:
    """Return the 16-byte key of a row's content.

    The hashed bytes are: T as little-endian uint32, `token_ids` [T] and `spans` [n, 2], both as little-endian int32.
    """
    tokens = np.ascontiguousarray(token_ids, dtype="<i4")
    digest = xxhash.xxh3_128(len(tokens).to_bytes(4, "little"))
    digest.update(tokens.data)
    digest.update(np.ascontiguousarray(spans, dtype="<i4").tobytes())
    return digest.digest()


def is_heldout(group: bytes, fraction: float) -> bool:
    """Tell whether a group belongs to the hold-out; a larger fraction holds out a superset of a smaller one."""
    return xxhash.xxh3_64_intdigest(group, seed=_HELDOUT_SEED) < fraction * _HASH64_RANGE


def row_salt(row_key: bytes) -> int:
    """Return what keys the random numbers of a row, 63 bits; never 0, which means none."""
    return (xxhash.xxh3_64_intdigest(row_key) >> 1) or 1


class KeySet:
    """A sorted set of 16-byte keys at 16 bytes each (a Python set of bytes takes about 100).

    Build O(n log n); `contains` O(q log n).
    """

    def __init__(self, keys: NDArray[np.uint8]) -> None:
        """Take [n, 16] key bytes in any order, repeats allowed."""
        self._keys = np.sort(_as_strings(keys))

    def __len__(self) -> int:
        return len(self._keys)

    def contains(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return [q] whether each of the [q, 16] keys is in the set."""
        asked = _as_strings(keys)
        places = np.searchsorted(self._keys, asked)
        found: NDArray[np.bool_] = places < len(self._keys)
        found[found] = self._keys[places[found]] == asked[found]
        return found


def _as_strings(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Return [n, 16] key bytes as [n] strings, which sort as they do."""
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise ValueError(f"keys must be [n, {KEY_BYTES}] bytes, got shape {keys.shape}")
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()


def stack_keys(keys: list[bytes]) -> NDArray[np.uint8]:
    """Return [n, 16] key bytes of a list of keys."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)

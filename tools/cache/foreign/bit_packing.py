"""Integers packed into streams of bits, as DistillKit stores ids and residuals; numbers of four types from bytes.

Cost: a byte of memory per bit of one row.

Shape letters: S positions, B bytes of one, N integers of one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUMBER_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Types of numbers and their bytes."""


def packed_bytes(bits: int, count: int) -> int:
    """Return how many bytes `count` integers of `bits` bits take."""
    return (bits * count + 7) // 8


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return [S, N] integers of up to 63 bits from [S, B] bytes, the most significant bit first.

    >>> unpack(np.array([[0b10110100]], np.uint8), 3, 2)
    array([[5, 5]])
    """
    stream = np.unpackbits(packed, axis=1, count=bits * count).reshape(len(packed), count, bits)
    value = np.zeros(stream.shape[:2], np.int64)
    for bit in range(bits):
        value = (value << 1) | stream[:, :, bit]
    return value


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Return [S, B] bytes of [S, N] integers, the most significant bit first, padded with zeros to whole bytes."""
    stream = (values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(len(values), -1), axis=1)


def unpack_words(words: NDArray[np.uint64], bits: int, count: int) -> NDArray[np.int64]:
    """Return [S, count] integers from [S, W] words of 64 bits: as many as fit whole, the lowest bits first."""
    each = 64 // bits
    shifts = (np.arange(each) * bits).astype(np.uint64)
    values = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    return values.reshape(len(words), -1)[:, :count].astype(np.int64)


def numbers(raw: NDArray[np.uint8], kind: str) -> NDArray[np.float64]:
    """Return [S, N] numbers from [S, N x size] little-endian bytes."""
    raw = np.ascontiguousarray(raw)
    if kind == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(f"<f{NUMBER_BYTES[kind]}").astype(np.float64)


def rounded(values: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Return what is left of values in a type, rounded to nearest even."""
    if kind == "bfloat16":
        word = values.astype(np.float32).view(np.uint32)
        return (((word + 0x7FFF + ((word >> 16) & 1)) >> 16) << 16).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype(f"<f{NUMBER_BYTES[kind]}").astype(np.float64)

"""A row's hidden states, pooled state and attention as arrays, quantised: what a `hidden/` layer keeps of a teacher.

A vector is 8-bit integers with one float32 scale, absmax / 127, so each coordinate is within scale / 2 = absmax / 254
of the true one. Attention is head-averaged; of each query the strongest keys keep their masses in units of 1 / 65535,
rounded down, and a key whose mass rounds to nothing is dropped. So the rest, which is derived, is never negative and
every query sums to 1.
Cost: one pass.

Shape letters: S supervised positions of a row, L hidden layers, D width of a vector, A attention layers, N kept keys of
one attention layer (sum of counts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.payload.ragged import segment_sum

MASS_UNIT = 65_535
"""A mass of 1 in stored units; the quantisation step of a mass is 1 / 65535."""
_LEAST_ABSMAX = 1e-30
"""A vector below it everywhere is stored as zeros: its scale would leave float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Vectors of 8-bit integers with a scale each."""

    values: NDArray[np.int8]
    """[..., D] from -127 to 127."""
    scales: NDArray[np.float32]
    """[...] what each vector's integers are multiplied by."""

    @classmethod
    def quantise(cls, vectors: NDArray[Any]) -> Vectors:
        """Return the nearest integers of [..., D] real vectors.

        Raises:
            ValueError: a value is not finite.
        """
        exact = np.asarray(vectors, dtype=np.float32)
        largest = np.abs(exact).max(axis=-1, initial=0.0)
        if not bool(np.isfinite(largest).all()):
            raise ValueError("a hidden state is not finite")
        scales = np.where(largest < _LEAST_ABSMAX, 0.0, largest / 127).astype(np.float32)
        steps = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
        integers = np.rint(exact * steps[..., None])
        return cls(np.clip(integers, -127, 127, out=integers).astype(np.int8), scales)

    def dense(self) -> NDArray[np.float32]:
        """Return [..., D] float32 vectors."""
        return self.values.astype(np.float32) * self.scales[..., None]


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Head-averaged attention of one layer, from each supervised position's query: that of the token
    before the label.
    """

    counts: NDArray[np.int32]
    """[S] keys kept per query."""
    distances: NDArray[np.int32]
    """[N] position of the query minus that of the key, by descending mass within a query."""
    mass_codes: NDArray[np.int32]
    """[N] masses in units of 1 / 65535, at least 1."""

    @classmethod
    def quantise(cls, distances: NDArray[Any], masses: NDArray[Any]) -> Attention:
        """Return what is kept of [S, m] keys by descending mass; a slot without a key has mass 0.

        Raises:
            ValueError: masses that are no masses.
        """
        exact = np.asarray(masses, dtype=np.float64)
        if not bool(((exact >= 0) & (exact <= 1 + 1e-3)).all()) or not bool((exact.sum(axis=-1) <= 1 + 1e-3).all()):
            raise ValueError("attention masses of a query are negative, not finite or add up to more than 1")
        exact /= np.maximum(exact.sum(axis=-1, keepdims=True), 1.0)  # float32 may exceed 1 by its rounding
        codes = np.floor(exact * MASS_UNIT).astype(np.int32)
        kept = codes > 0
        return cls(kept.sum(axis=-1, dtype=np.int32), np.asarray(distances)[kept].astype(np.int32), codes[kept])

    @property
    def masses(self) -> NDArray[np.float32]:
        """[N] masses of the kept keys."""
        return self.mass_codes.astype(np.float32) / np.float32(MASS_UNIT)

    @property
    def rest_codes(self) -> NDArray[np.int32]:
        """[S] mass of all other keys in units of 1 / 65535: what the kept ones leave."""
        return MASS_UNIT - segment_sum(self.mass_codes, self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """What a hidden layer keeps of one row; its identity says which layers of the teacher."""

    states: Vectors
    """[L, S, D]: entry s is the state that predicts the s-th supervised token."""
    pooled: Vectors | None = None
    """[D] of the whole row, or None."""
    attention: tuple[Attention, ...] = ()
    """One per attention layer."""

    @property
    def num_positions(self) -> int:
        """S."""
        return int(self.states.scales.shape[1])

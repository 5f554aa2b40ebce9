"""How often a guess is right, by how sure it is: sums over bins of a probability, for reliability and agreement.

Equal bins from 0 to 1; what lies on an edge counts to the bin above. Cost: linear in positions, 3 numbers per bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class ConfidenceBins:
    """Sums per bin; add up to those of more positions."""

    positions: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    """Sum of the probabilities."""
    hits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))

    @classmethod
    def of(cls, probabilities: NDArray[np.float64], right: NDArray[np.bool_]) -> ConfidenceBins:
        """Sum up positions: the probability of each guess [S] and whether it was right [S]."""
        place = np.clip((probabilities * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        sums = (np.bincount(place, weights, NUM_BINS) for weights in (None, probabilities, right))
        return cls(*(column.astype(np.float64) for column in sums))

    def __add__(self, other: ConfidenceBins) -> ConfidenceBins:
        """Return the sums over the positions of both."""
        return ConfidenceBins(
            self.positions + other.positions, self.confidence + other.confidence, self.hits + other.hits
        )

    def gap(self) -> float | None:
        """Return the expected calibration error: mean |confidence - share right| over bins, by positions; None without.

        Naeini, Cooper and Hauskrecht (2015), AAAI.
        """
        total = float(self.positions.sum())
        return math.fsum(np.abs(self.confidence - self.hits)) / total if total else None

    def figures(self) -> list[dict[str, Any]]:
        """Return per bin that has positions: low, high, positions, confidence (mean probability), right (share)."""
        return [
            {
                "low": index / NUM_BINS,
                "high": (index + 1) / NUM_BINS,
                "positions": int(self.positions[index]),
                "confidence": float(self.confidence[index] / self.positions[index]),
                "right": float(self.hits[index] / self.positions[index]),
            }
            for index in np.flatnonzero(self.positions).tolist()
        ]

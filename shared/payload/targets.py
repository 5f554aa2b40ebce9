"""A row's sparse next-token distributions as arrays, before and after the disk.

Entry s describes the distribution that *predicts* the s-th token of the row's concatenated spans. All log-probabilities
are natural logs under the full-vocabulary softmax at temperature 1. Ragged supports are flat arrays with a count per
position.

Shape letters: S supervised positions, N head entries (sum of counts), J captured temperatures, D distinct draws of one
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Tokens drawn from the part of the teacher's distribution outside the head, at one temperature.

    A draw needs no value: it stands for `tail mass x multiplicity / m`, m being the draws made per position.
    """

    counts: IntArray
    """[S] distinct drawn tokens per position."""
    ids: IntArray
    """[D] token ids, grouped by position, ascending within one, none twice within one."""
    multiplicities: IntArray
    """[D] how often each was drawn; sums to m within a position that has a tail."""


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """Sparse next-token distributions of one row's supervised positions."""

    counts: IntArray
    """[S] head entries per position; 0 everywhere in mode `sample`."""
    ids: IntArray
    """[N] token ids of the heads, by descending probability within a position, none twice within one."""
    logprobs: FloatArray
    """[N] natural logs at temperature 1."""
    label_logprobs: FloatArray
    """[S] log-probability of the token that follows, inside the head or not."""
    tail_logmass: FloatArray
    """[S, J] log of the mass outside the head at each captured temperature; -inf where the head is the whole
    vocabulary, 0 without a head, NaN where it is not known (a layer whose tail is `unknown`)."""
    temperatures: tuple[float, ...] = (1.0,)
    """J captured temperatures, ascending, 1.0 among them."""
    draws: tuple[Draws, ...] = ()
    """One `Draws` per temperature, or empty where none were made."""

    @property
    def num_positions(self) -> int:
        """S, the number of supervised positions."""
        return len(self.counts)

    def offsets(self) -> NDArray[np.int64]:
        """Return [S + 1] offsets of each position's head in `ids` and `logprobs`."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

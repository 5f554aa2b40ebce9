"""A fixed random projection of hidden states, drawn from a seed and never stored.

Entries are Gaussian with variance 1 / D, so squared lengths and distances are kept on average, within a factor of 1 +-
e for nearly all pairs of n vectors at D of about 8 ln(n) / e^2 (Johnson and Lindenstrauss, 1984). The bits come from
Philox, a counter-based generator whose stream is fixed by its paper, and become Gaussian by Box and Muller's formula in
float64; so any machine draws the same matrix up to the last bit of its logarithm and cosine.
Cost: W x D numbers, once per process; one matrix product per state.

Shape letters: W teacher width, D projected width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def projection_matrix(width: int, projected_width: int, seed: int) -> NDArray[np.float32]:
    """Return [W, D] float32, a pure function of its arguments.

    >>> projection_matrix(3, 2, seed=7).shape
    (3, 2)
    """
    bits = np.random.Philox(key=seed).random_raw(2 * width * projected_width)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[::2]))
    gaussian = radius * np.cos(2.0 * np.pi * uniform[1::2])
    return (gaussian / np.sqrt(projected_width)).reshape(width, projected_width).astype(np.float32)

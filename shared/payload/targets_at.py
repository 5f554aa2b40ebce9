"""Head log-probabilities at another captured temperature.

The full softmax at T is softmax(z / T) = softmax(lp / T), so within the head the ratios are those of lp / T, and the
head's mass is what the stored tail at T leaves: log p_T = lp / T - logsumexp(lp / T over the head) + log(1 - tail_T).
Exact, since the tail at T was measured over the whole vocabulary. Cost: one pass over the head entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import UsageError
from shared.payload.ragged import segment_logsumexp
from shared.payload.targets import SparseTargets


def temperature_index(temperatures: tuple[float, ...], temperature: float) -> int:
    """Return the column of `tail_logmass` that belongs to a temperature.

    Raises:
        UsageError: the temperature was not captured.
    """
    for j, captured in enumerate(temperatures):
        if abs(captured - temperature) <= 1e-6 * captured:
            return j
    listed = ", ".join(f"{t:g}" for t in temperatures)
    raise UsageError(
        f"temperature {temperature:g} was not captured (captured: {listed}), so the tail at it is unknown; "
        "use a captured temperature or capture another layer with it"
    )


def head_logprobs_at(targets: SparseTargets, temperature: float) -> NDArray[np.float32]:
    """Return [N] float32 natural logs of the head's probabilities under the full softmax at a captured temperature.

    Raises:
        UsageError: the temperature was not captured.
    """
    j = temperature_index(targets.temperatures, temperature)
    if targets.temperatures[j] == 1.0:
        return targets.logprobs
    scaled = targets.logprobs.astype(np.float64) / temperature
    with np.errstate(divide="ignore", invalid="ignore"):  # positions without a head: log(0) - log(0), used by no entry
        head_logmass = np.log(-np.expm1(np.minimum(targets.tail_logmass[:, j].astype(np.float64), 0.0)))
        level = head_logmass - segment_logsumexp(scaled, targets.counts)
    return (scaled + np.repeat(level, targets.counts)).astype(np.float32)

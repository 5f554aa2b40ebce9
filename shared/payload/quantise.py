"""Scalar quantisers of the codec: label log-probabilities and tail masses as 16-bit codes.

- Label: fixed point, code = round(-logprob x 512), at most 1/1024 nat off down to -127.996 nats; lower ones are stored
  as that; 65535 is -inf.
- Tail: log-odds x = log(tail / (1 - tail)), code = 32768 + round(1024 x), at most 1/2048 off for |x| <= 31.998; beyond
  (a mass within 1.3e-14 of 0 or 1) the last finite code is stored; 0 is no tail, 65535 is nothing but tail. Log-odds
  keep both ends of the range, where a code for the mass or for its log would lose one of them, and give head and tail
  that sum to 1 exactly.

Decoding is a look-up in a table of 65,536 float64.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

LABEL_STEPS_PER_NAT = 512
LABEL_IMPOSSIBLE = 65_535
LEAST_LABEL_LOGPROB = -(LABEL_IMPOSSIBLE - 1) / LABEL_STEPS_PER_NAT
"""Lower ones are stored as this."""
MOST_LABEL_ERROR = 1e-3
"""Half a step, or what a label above 0 by rounding loses."""
TAIL_STEPS_PER_UNIT = 1024
TAIL_MIDDLE = 32_768
TAIL_NONE = 0
TAIL_ALL = 65_535

Codes = NDArray[np.uint16]


def label_codes(label_logprobs: NDArray[np.float32]) -> Codes:
    """Return [S] codes of label log-probabilities in nats (-inf allowed).

    Raises:
        ValueError: one is NaN or above 0.001.
    """
    values = label_logprobs.astype(np.float64)
    if not bool((values <= 1e-3).all()):
        raise ValueError("a label's log-probability is NaN or above 0")
    with np.errstate(invalid="ignore"):
        steps = np.rint(-values * LABEL_STEPS_PER_NAT)
    codes = np.clip(steps, 0, LABEL_IMPOSSIBLE - 1)
    codes[np.isneginf(values)] = LABEL_IMPOSSIBLE
    return codes.astype(np.uint16)


@cache
def label_table() -> NDArray[np.float32]:
    """Return [65536] the log-probability in nats that each label code stands for."""
    table = (-np.arange(65_536, dtype=np.float64) / LABEL_STEPS_PER_NAT).astype(np.float32)
    table[LABEL_IMPOSSIBLE] = -np.inf
    table.setflags(write=False)
    return table


def tail_codes(tail_logmass: NDArray[np.float32], has_head: NDArray[np.bool_]) -> Codes:
    """Return codes of tail log-masses in nats.

    Args:
        tail_logmass: [S, J]; -inf where the head is the whole vocabulary, 0 where there is no head.
        has_head: [S] whether the position has a head entry; with one, the tail never becomes all of the mass.

    Raises:
        ValueError: one is NaN or above 0, or a position without a head has a tail other than 1.
    """
    values = tail_logmass.astype(np.float64)
    if not bool((values <= 1e-6).all()):
        raise ValueError("a tail's log-mass is NaN or above 0")
    values = np.minimum(values, 0.0)
    if bool((values[~has_head] < -1e-6).any()):
        raise ValueError("a position without head entries must have a tail of 1 (log-mass 0)")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_odds = values - np.log(-np.expm1(values))
    codes = np.clip(TAIL_MIDDLE + np.rint(log_odds * TAIL_STEPS_PER_UNIT), TAIL_NONE + 1, TAIL_ALL - 1)
    codes[np.isneginf(values)] = TAIL_NONE
    codes[~has_head] = TAIL_ALL
    return codes.astype(np.uint16)


@cache
def tail_tables() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two [65536] tables: log of the tail's mass and log of the head's mass that each tail code stands for."""
    log_odds = (np.arange(65_536, dtype=np.float64) - TAIL_MIDDLE) / TAIL_STEPS_PER_UNIT
    log_odds[TAIL_NONE] = -np.inf
    log_odds[TAIL_ALL] = np.inf
    tail = -np.logaddexp(0.0, -log_odds)
    head = -np.logaddexp(0.0, log_odds)
    for table in (tail, head):
        table.setflags(write=False)
    return tail, head

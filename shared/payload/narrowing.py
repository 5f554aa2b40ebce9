"""A layer that holds more than a request asks for serves it: its heads are cut when a row is read, exactly.

Mode `top`: a smaller k, a smaller mass or fewer temperatures. What is cut joins the tail: the mass of each entry at T
follows from the stored tail at T (`shared.payload.targets_at`), so the narrowed row is what a capture of its own would
have stored, up to quantisation (the quantised head decides where `mass` is reached, so a position may keep one entry
more or less than it would have).
Modes with draws: fewer temperatures only, since the tail of another head has other draws; where `mass` cuts the head,
the highest temperature must stay, because it decides the cut. Temperatures that were not asked for stay: they change no
other.

Cost: one pass over the head entries of a row that is narrowed; nothing otherwise.
Shape letters: S positions, N head entries, J captured temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.payload.ragged import position_of, segment_sum, starts_of
from shared.payload.targets import Draws, SparseTargets
from shared.payload.targets_at import head_logprobs_at


@dataclass(frozen=True, slots=True)
class Narrowing:
    """How far heads are cut."""

    k: int
    """Most entries that stay."""
    mass: float
    """Stop before k once this much probability is covered."""
    cut_temperature: float
    """The temperature at which `mass` is measured."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """A targets layer of mode `top` with heads cut to what a request asks for."""

    name: str
    """NAME or NAME-HASH8 of the layer."""
    narrowing: Narrowing

    def __str__(self) -> str:
        """Return name and what is kept, for identities and messages."""
        cut = self.narrowing
        return f"{self.name} cut to k {cut.k}, mass {cut.mass:g} at temperature {cut.cut_temperature:g}"


def narrow(targets: SparseTargets, narrowing: Narrowing) -> SparseTargets:
    """Return targets with the heads that a capture of its own would have stored.

    Raises:
        UsageError: the narrowing's temperature was not captured.
    """
    kept = kept_entries(targets, narrowing)
    return targets if kept is None else keep_entries(targets, kept, targets.draws)


def kept_entries(targets: SparseTargets, narrowing: Narrowing) -> NDArray[np.bool_] | None:
    """Return [N] which head entries stay; None where all do."""
    place = np.arange(len(targets.ids), dtype=np.int64) - np.repeat(starts_of(targets.counts), targets.counts)
    kept: NDArray[np.bool_] = place < narrowing.k
    if narrowing.mass < 1.0 and len(targets.ids):
        masses = np.exp(head_logprobs_at(targets, narrowing.cut_temperature).astype(np.float64))
        running = masses.cumsum() - masses
        before = running - running[starts_of(targets.counts)[position_of(targets.counts)]]
        kept &= (before < narrowing.mass) | (place == 0)
    return None if kept.all() else kept


def keep_entries(targets: SparseTargets, kept: NDArray[np.bool_], draws: tuple[Draws, ...]) -> SparseTargets:
    """Return targets with the head entries [N] that are `kept`, the mass of the others moved into the tail at every
    temperature.
    """
    tails = []
    for j, temperature in enumerate(targets.temperatures):
        masses = np.where(kept, 0.0, np.exp(head_logprobs_at(targets, temperature).astype(np.float64)))
        with np.errstate(divide="ignore"):
            lost = np.log(segment_sum(masses, targets.counts))
        tails.append(np.minimum(np.logaddexp(targets.tail_logmass[:, j], lost), 0.0).astype(np.float32))
    counts = segment_sum(kept.astype(np.int32), targets.counts).astype(np.int32)
    ids, logprobs = targets.ids[kept], targets.logprobs[kept]
    return replace(
        targets, counts=counts, ids=ids, logprobs=logprobs, tail_logmass=np.stack(tails, axis=1), draws=draws
    )

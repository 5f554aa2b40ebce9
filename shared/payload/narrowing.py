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
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.payload.ragged import position_of, segment_sum, starts_of
from shared.payload.targets import Draws, SparseTargets
from shared.payload.targets_at import head_logprobs_at


class Captured(Protocol):
    """What a capture says: `shared.recipe.recipe.Capture` and `shared.identity.identity.LayerIdentity` alike."""

    @property
    def mode(self) -> str:
        """Either top, sample or top+sample."""
        ...

    @property
    def k(self) -> int:
        """Most head entries."""
        ...

    @property
    def draws(self) -> int:
        """Drawn tokens per position and temperature."""
        ...

    @property
    def mass(self) -> float:
        """Probability that a head covers at most."""
        ...

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Captured temperatures, ascending."""
        ...

    @property
    def gap_step(self) -> float:
        """Quantisation step in nats."""
        ...

    @property
    def label(self) -> str:
        """Either apart, or head where the token that follows is always in the head."""
        ...


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


def holds(found: Captured, wanted: Captured) -> bool:
    """Tell whether a layer's targets hold those of a capture by the same teacher."""
    fixed = [(each.mode, each.draws, each.gap_step, each.label) for each in (found, wanted)]
    if fixed[0] != fixed[1]:
        return False
    if found.label == "head" and narrowing_to(found, wanted) is not None:
        return False  # where a head is cut, a label that belonged to it would be cut as well
    if not set(wanted.temperatures) <= set(found.temperatures):
        return False
    if wanted.mode == "top":
        return found.k >= wanted.k and found.mass >= wanted.mass
    return narrowing_to(found, wanted) is None


def narrowing_to(found: Captured, wanted: Captured) -> Narrowing | None:
    """Return how heads of `found` become those of `wanted`; None where they are the same."""
    same_cut = found.mass == 1.0 or found.temperatures[-1] == wanted.temperatures[-1]
    if (found.k, found.mass) == (wanted.k, wanted.mass) and same_cut:
        return None
    return Narrowing(wanted.k, wanted.mass, wanted.temperatures[-1])


def can_narrow(found: Captured, narrowing: Narrowing) -> bool:
    """Tell whether a layer holds the heads that a narrowing keeps."""
    within = narrowing.k <= found.k and narrowing.mass <= found.mass
    return found.mode == "top" and found.label == "apart" and within and narrowing.cut_temperature in found.temperatures


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

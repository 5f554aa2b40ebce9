"""Which column of a scored row holds what: the contract between the worker that fills rows and the front end that reads
them.

    [ label | K head entries | label again, where wanted | J tails, ids are sentinels | J x m draws, temperature by
      temperature ]

The label is the token that actually follows; it may appear again in the head. Where it is to be in the head always, one
more head column holds it if none of the K does. An id below 0 in a head or draw column
means "nothing here" (cut by `mass`, a padded vocabulary entry, or an empty tail). A tail column holds a log-mass and an
id that no token has, so that a row filled by anything else than the tail plug-in is noticed.

Shape letters: K head entries at most, J captured temperatures, m draws per position and temperature.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shared.errors import EngineError
from shared.identity.identity import LayerIdentity
from shared.recipe.recipe import Capture

NOTHING = -1
"""Id of an empty head or draw column."""
FIRST_SENTINEL = -1000
"""Id of the first tail column; the j-th has this minus j."""
CHUNK_ENTRIES = {"cpu": 2**21, "cuda": 2**26}
"""Entries of rows x vocabulary that columns are computed from at once: 8 MiB in float32 on a CPU, so that memory is
reused warm, 256 MiB on a GPU."""


@dataclass(frozen=True, slots=True)
class ColumnLayout:
    """What a scored row holds, and how its head is cut."""

    num_head: int
    """K; 0 in mode sample."""
    temperatures: tuple[float, ...]
    """J captured temperatures, ascending."""
    num_draws: int
    """m; 0 in mode top."""
    mass: float
    """The head stops once it covers this much probability at the highest temperature."""
    vocab_size: int
    """Ids from here on are padding of the model's head: never captured, their mass stays in the tail."""
    has_label: bool = False
    """The label is in the head, in a column of its own where it is none of the K."""

    @classmethod
    def of(cls, capture: Capture | LayerIdentity, vocab_size: int) -> ColumnLayout:
        """Return the layout that a capture asks for or a layer was made with, K at most the vocabulary."""
        k, in_head = min(capture.k, vocab_size), capture.label == "head"
        return cls(k, tuple(capture.temperatures), capture.draws, capture.mass, vocab_size, in_head)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ColumnLayout:
        """Return the layout that `to_plain` described."""
        return cls(**{**plain, "temperatures": tuple(plain["temperatures"])})

    def to_plain(self) -> dict[str, Any]:
        """Return numbers and lists only, fit for a remote call."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @property
    def sentinels(self) -> range:
        """The J ids of the tail columns."""
        return range(FIRST_SENTINEL, FIRST_SENTINEL - len(self.temperatures), -1)

    @property
    def num_extra(self) -> int:
        """Columns besides the label: what is asked of the engine as its number of log-probabilities."""
        return self.num_head + self.has_label + len(self.temperatures) * (1 + self.num_draws)

    @property
    def tail_start(self) -> int:
        """First tail column."""
        return 1 + self.num_head + self.has_label

    @property
    def draw_start(self) -> int:
        """First draw column."""
        return self.tail_start + len(self.temperatures)

    @property
    def stock_columns_suffice(self) -> bool:
        """Whether head and tail can be had from plain top-k columns, the tail as 1 minus their sum."""
        return self.temperatures == (1.0,) and self.num_draws == 0


def required(layout: ColumnLayout | None) -> ColumnLayout:
    """Return the layout of an engine that is to score.

    Raises:
        EngineError: the engine has none.
    """
    if layout is None:
        raise EngineError("this engine was opened without a capture and cannot score; open it with one")
    return layout

"""What phase 1 asks of an engine: answer prompts, score sequences. Streams in, streams out, any order.

An engine pulls requests lazily from an iterator, keeps as many in flight as it likes (bounded), and yields each result
as soon as it is done, in any order, with the request's `tag` untouched. So the builder can feed requests of the next
unit while the last of this one finish, and an engine that needs fixed batches (transformers) cuts them wherever `unit`
changes.

Shape letters: T tokens of a sequence, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError
from shared.payload.hidden import HiddenStates
from shared.payload.targets import SparseTargets
from shared.recipe.recipe import Generate

FINISHED = ("stop", "length")
"""Ends of an answer that is one; engines know others (abort, error, repetition)."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One answer wanted."""

    tag: Any
    """Comes back with the result; the engine never looks inside."""
    unit: int
    """Requests of one unit arrive together; batches of a batch engine never cross a unit."""
    token_ids: list[int]
    """The rendered prompt, generation prompt included."""
    seed: int
    """Seed of this answer alone (63 bits), so that an interrupted build continues as it would have run."""
    end_token_ids: tuple[int, ...] = ()
    """End tokens of the prompt's chat template; those that the model's own files declare end it anyway."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    tag: Any
    token_ids: list[int]
    """The answer, end token included where one ended it, a stop text and what follows it cut off."""
    finish_reason: str
    """stop | length, or what else made the engine give it up: then it is no answer."""
    cut_at_stop: bool = False
    """A stop text ended it, so the model wrote no end token."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One sequence to score."""

    tag: Any
    unit: int
    token_ids: NDArray[np.int32]
    """[T]"""
    spans: NDArray[np.int32]
    """[n, 2] start and end (exclusive) of supervised tokens; start >= 1."""
    draw_salt: int = 0
    """Keys the row's draws (63 bits); 0: they depend on the tokens before a position alone."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The teacher's distributions at a sequence's supervised positions, exact, before any quantisation."""

    tag: Any
    targets: SparseTargets


@dataclass(frozen=True, slots=True)
class Captured:
    """The teacher's hidden states at a sequence's supervised positions, quantised."""

    tag: Any
    hidden: HiddenStates


def room_of(request: GenerateRequest, max_model_len: int) -> int:
    """Return how many tokens an answer may have: a prompt of 10 within 16 leaves 6.

    Raises:
        EngineError: none, or there is no prompt.
    """
    if not 1 <= len(request.token_ids) < max_model_len:
        raise EngineError(
            f"a prompt has {len(request.token_ids)} tokens, which leaves no room for an answer within "
            f"teacher.max_model_len {max_model_len}; raise it or drop the prompt"
        )
    return max_model_len - len(request.token_ids)


def require_scorable(request: ScoreRequest, max_model_len: int) -> None:
    """Refuse a sequence of which no token is predicted, or one that is too long.

    Raises:
        EngineError: it is.
    """
    found = len(request.token_ids)
    if not 2 <= found <= max_model_len:
        raise EngineError(
            f"a sequence to score has {found} tokens; expected 2 to teacher.max_model_len {max_model_len}"
        )


class Engine(Protocol):
    """A loaded teacher."""

    max_model_len: int
    """Longest sequence, prompt and answer together, in tokens."""

    def generate(self, requests: Iterable[GenerateRequest], settings: Generate) -> Iterator[Generated]:
        """Answer each request once, in any order."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Score each request once, in any order, as the engine's `Capture` says."""

    def provenance(self) -> Mapping[str, Any]:
        """Say what ran: engine and library versions, device, head dtype, whether seeds were honoured, which capture
        path.
        """

    def close(self) -> None:
        """Release processes and memory; safe to call twice."""

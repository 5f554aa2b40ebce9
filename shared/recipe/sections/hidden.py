"""What a recipe may say about the hidden layer of a cache: which states and which attention of the teacher are kept,
and how.

Layers count from 1 for the output of the first block to the number of blocks; `final` is the state after the last norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from shared.recipe.base import Count, Integer, Problem, Section
from shared.schema import MAX_HIDDEN_LAYERS, MAX_HIDDEN_WIDTH, MAX_STRONGEST_KEYS

StateLayer = int | Literal["final"]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_HIDDEN_LAYERS


def _layers(value: Any, words: tuple[str, ...], expected: str) -> Any:
    """Return a count or a tuple of layers, or refuse it in one sentence instead of one per branch of a union."""
    if _is_count(value):
        return value
    if isinstance(value, list | tuple) and all(_is_count(entry) or entry in words for entry in value):
        return tuple(value)
    raise PydanticCustomError("layers", "expected {expected}", {"expected": expected})


def _state_layers(value: Any) -> Any:
    return _layers(value, ("final",), "how many layers to spread evenly, or a list of layer numbers from 1 and 'final'")


def _attention_layers(value: Any) -> Any:
    return _layers(value, (), "how many layers to spread evenly, or a list of layer numbers from 1")


class AttentionCapture(Section):
    """Which of the teacher's attention is kept."""

    layers: Annotated[int | tuple[int, ...], BeforeValidator(_attention_layers)] = 1
    """Teacher layers, counted from 1; or how many to spread evenly with the last among them."""
    strongest: Annotated[Count, Field(le=MAX_STRONGEST_KEYS)] = 16
    """Keys kept per query, by mass averaged over heads; all others are one bucket."""


class HiddenCapture(Section):
    """What a hidden layer of the cache keeps of the teacher at each supervised position."""

    layers: Annotated[int | tuple[StateLayer, ...], BeforeValidator(_state_layers)] = ()
    """Teacher layers whose states are kept, counted from 1, `final` for the state after the last norm; or how many to
    spread evenly with the last among them."""
    projection: Annotated[Count, Field(le=MAX_HIDDEN_WIDTH)] | None = None
    """Width of a fixed random projection of every state; left out: the teacher's own width."""
    projection_seed: Annotated[Integer, Field(ge=0)] = 0
    """Seed of the projection's matrix, which is drawn again instead of stored."""
    pooled: Literal["none", "mean", "last"] = "none"
    """One vector per row: the final state, averaged over the supervised positions or of the last one."""
    attention: AttentionCapture | None = None
    """Attention of some layers."""

    def _problems(self) -> Iterator[Problem]:
        if not self.layers and self.pooled == "none" and self.attention is None:
            yield ("layers",), "nothing is asked for; name layers, pooled or attention"
        if self.projection is not None and not self.layers and self.pooled == "none":
            yield ("projection",), "there is no state to project, only attention; leave it out"
        if self.projection_seed and self.projection is None:
            yield ("projection_seed",), "there is no projection to seed; leave it out or set a projection"
        for name, layers in (("layers", self.layers), ("attention", getattr(self.attention, "layers", ()))):
            if not isinstance(layers, int) and len(set(layers)) < len(layers):
                yield (name,), "a layer is listed twice; list each once"
        if self.attention is not None and self.attention.layers == ():
            yield ("attention", "layers"), "no layer is named; name some, or leave attention out"

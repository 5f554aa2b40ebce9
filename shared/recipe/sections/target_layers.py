"""What a stage may say about several teachers: which targets layers, how strong each counts, for which sources.

The divergence of the stage's losses is taken to each layer and weighted; for forward KL the sum has the gradient of the
mixture of the teachers' distributions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from shared.recipe.base import Problem, Section, Text
from shared.recipe.schedule import Schedule, constant


class TargetLayer(Section):
    """One of several teachers of a stage."""

    layer: Text
    """Name of its targets layer: a name of `teachers`, a layer of the cache, or teacher for the recipe's own."""
    weight: Schedule = constant(1.0)
    """What each divergence from it is multiplied by, besides the loss's own weight: a number or a schedule."""
    sources: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Sources whose rows it teaches; left out: all."""

    @property
    def mean_weight(self) -> float:
        """Mean of the weight over the stage, by which held-out figures weigh the teachers."""
        return sum(self.weight.value(i / 100) for i in range(101)) / 101


def layer_keys(targets: Sequence[TargetLayer]) -> list[str]:
    """Return what the entries are called in logs: the layer, with _2, _3 ... where it comes again for other sources.

    >>> layer_keys([TargetLayer(layer="math"), TargetLayer(layer="code")])
    ['math', 'code']
    """
    names = [entry.layer for entry in targets]
    return [name if name not in names[:i] else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def target_problems(targets: Sequence[TargetLayer]) -> Iterator[Problem]:
    """Yield what is wrong with a stage's teachers by themselves."""
    for i, entry in enumerate(targets):
        if max(entry.weight.extremes()) == 0:
            yield ("targets", i, "weight"), "this weight is always 0; leave the layer out"
        for other in targets[:i]:
            if other.layer != entry.layer:
                continue
            shared = None in (other.sources, entry.sources) or set(other.sources or ()) & set(entry.sources or ())
            if shared:
                said = f"layer '{entry.layer}' teaches some rows twice; add up its weights in one entry"
                yield ("targets", i, "layer"), said
                break

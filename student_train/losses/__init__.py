"""What is minimised? One divergence or loss per file, named as a recipe names it, its `LOSS` saying what it is; those
on hidden layers in a folder of their own.

The names are those of `shared.recipe.sections.losses`: a name there without a file here does not import.
"""

from __future__ import annotations

from importlib import import_module

from shared.recipe.sections.losses import LOSSES, OnHiddenLayer, names_of
from student_train.losses.divergence import ZERO_LOG_MASS, Divergence, LossTerm
from student_train.losses.hidden_layers.representation import Representation
from student_train.losses.likelihood import Likelihood

registry: dict[str, Divergence | Likelihood | Representation] = {
    name: import_module(f"{__name__}.{'hidden_layers.' if issubclass(kind, OnHiddenLayer) else ''}{name}").LOSS
    for kind in LOSSES
    for name in names_of(kind)
}
"""Every loss by the name that a recipe gives it."""

divergences = {name: loss for name, loss in registry.items() if isinstance(loss, Divergence)}
"""Losses of the head, position by position."""

likelihoods = {name: loss for name, loss in registry.items() if isinstance(loss, Likelihood)}
"""Losses of the head on the likelihood of chunks of text."""

representations = {name: loss for name, loss in registry.items() if isinstance(loss, Representation)}
"""Losses of what is inside, on a hidden layer of the cache."""

__all__ = [
    "ZERO_LOG_MASS",
    "Divergence",
    "Likelihood",
    "LossTerm",
    "Representation",
    "divergences",
    "likelihoods",
    "registry",
    "representations",
]

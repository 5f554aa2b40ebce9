"""What a recipe may say about the terms of a training loss: one section per kind, told apart by `name`.

A kind has the options that mean something for it and no others. Recipes that version 1 wrote out hold every option of
every kind; `LOSS_KINDS` drops those that say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from shared.recipe.base import Kinds, Positive, Problem, Section, Share
from shared.recipe.schedule import Schedule, constant

StudentLayer = Annotated[int, Field(ge=1)] | Literal["final"]


class LossTerm(Section):
    """One term of the training loss, in nats per supervised position."""

    learns_from: ClassVar[Literal["text", "targets", "hidden"]] = "targets"
    """The tokens of the text, a targets layer of the cache, or a hidden layer."""
    weight: Schedule = constant(1.0)
    """What the term is multiplied by: a number or a schedule."""


class CrossEntropy(LossTerm):
    """Cross-entropy with the tokens of the text, at temperature 1."""

    learns_from = "text"
    temperature: ClassVar[Schedule] = constant(1.0)
    name: Literal["cross_entropy"]
    """Against the tokens of the text; needs no teacher."""


class OnTargets(LossTerm):
    """A loss against the teacher's next-token distributions."""

    weigh: Literal["entropy"] | None = None
    """entropy: each position is weighted by the teacher's entropy there over head and bucket, in nats."""


class Divergence(OnTargets):
    """A divergence between the teacher's and the student's next-token distributions."""

    name: Literal["forward_kl", "reverse_kl", "head_kl"]
    """forward_kl: KL(teacher || student), covers what the teacher may say; reverse_kl: KL(student || teacher), keeps to
    what it likes best; head_kl: forward KL given that the token is in the teacher's head, for layers whose tail is
    unknown."""
    temperature: Schedule = constant(1.0)
    """Temperature of both sides: a number or a step schedule; every value must have been captured."""

    def _problems(self) -> Iterator[Problem]:
        if min(self.temperature.extremes()) <= 0:
            yield ("temperature",), "a temperature must be above 0"
        if self.temperature.kind in ("linear", "cosine"):
            moves = f"a {self.temperature.kind} schedule passes through temperatures that were not captured"
            yield ("temperature", "kind"), f"{moves}; use a number, or kind 'step' with captured temperatures"


class JensenShannon(Divergence):
    """The generalised Jensen-Shannon divergence."""

    name: Literal["jsd"]  # type: ignore[assignment]
    """beta KL(teacher || mixture) + (1 - beta) KL(student || mixture)."""
    beta: Share = 0.5
    """Share of the teacher in the mixture."""


class TailWeightedKL(Divergence):
    """Forward KL whose tail, known from drawn tokens, weighs more or less than its mass."""

    name: Literal["tail_weighted_kl"]  # type: ignore[assignment]
    """KL over head and bucket, and `tail_weight` times the KL within the tail; needs a layer with draws."""
    tail_weight: Positive = 2.0
    """Weight of the tail's own part; 1 is forward_kl."""


class DecoupledKL(OnTargets):
    """KL whose head has a temperature of its own, also one that was not captured."""

    temperature: ClassVar[Schedule] = constant(1.0)
    name: Literal["decoupled_kl"]
    """KL of the head's mass against the bucket's at temperature 1, and within the head at `head_temperature`."""
    head_temperature: Positive = 2.0
    """Temperature of both sides within the head; its part is multiplied by the square."""


class SkewKL(Divergence):
    """KL against a mixture with a little of the other side, which stays bounded."""

    name: Literal["skew_forward_kl", "skew_reverse_kl"]  # type: ignore[assignment]
    """KL(teacher || skewed student) or KL(student || skewed teacher)."""
    skew: Share = 0.1
    """Share of the other side in the mixture."""


class LikelihoodMatching(LossTerm):
    """Is a chunk of text as likely to the student as to the teacher? For a teacher with another tokenizer."""

    temperature: ClassVar[Schedule] = constant(1.0)
    name: Literal["alm"]
    """Approximate likelihood matching of aligned chunks."""
    tau: Positive = 100.0
    """Likelihoods are taken to the power 1 / tau, so that long chunks are not impossible on both sides."""


def _layer_names(value: Any) -> Any:
    """Let teacher layers be written as numbers."""
    if isinstance(value, dict):
        return {
            str(key) if isinstance(key, int) and not isinstance(key, bool) else key: entry
            for key, entry in value.items()
        }
    return value


LayerMap = Annotated[dict[str, StudentLayer] | None, BeforeValidator(_layer_names)]


class OnHiddenLayer(LossTerm):
    """A loss that reads a hidden layer of the cache instead of a targets layer."""

    learns_from = "hidden"
    temperature: ClassVar[Schedule] = constant(1.0)


class HiddenStates(OnHiddenLayer):
    """Distance of projected student states from the teacher's, layer by layer."""

    name: Literal["hidden"]
    """States of layers, after a learned projection."""
    metric: Literal["mse", "cosine"] = "mse"
    """Mean squared error, or 1 minus the cosine."""
    normalise: bool = True
    """With mse: divide each teacher state by its root mean square, so that layers of large states weigh no more."""
    layer_map: LayerMap = None
    """Teacher layer -> student layer, counted from 1, `final` for the state after the last norm; left out: every stored
    teacher layer to the student layer at the same relative depth."""

    def _problems(self) -> Iterator[Problem]:
        yield from _map_problems(self.layer_map, has_final=True)
        if not self.normalise and self.metric == "cosine":
            yield ("normalise",), "a cosine does not see lengths, so leave it out"


class Attention(OnHiddenLayer):
    """Distance of the student's attention from the teacher's, layer by layer."""

    name: Literal["attention"]
    """Attention over the strongest keys and the rest."""
    layer_map: LayerMap = None
    """Teacher layer -> student layer, counted from 1; left out: every stored teacher layer to the student layer at the
    same relative depth."""

    def _problems(self) -> Iterator[Problem]:
        return _map_problems(self.layer_map, has_final=False)


class Contrastive(OnHiddenLayer):
    """Each row's pooled state must find its teacher's among those of the pack."""

    name: Literal["contrastive"]
    """Pooled states of rows."""
    tau: Positive = 0.07
    """What cosines are divided by."""


def names_of(kind: type[LossTerm]) -> tuple[str, ...]:
    """Return the names of a kind: ("forward_kl", "reverse_kl") of `Divergence`."""
    return tuple(kind.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]


TAKES_DRAWS_ALONE = ("forward_kl", "tail_weighted_kl")
"""Divergences that are right on a layer of mode `sample`, which has no head: their gradient is linear in the teacher's
masses, so that drawn tokens, whose weights are right on average, give the right gradient on average."""
NEEDS_DRAWS = ("tail_weighted_kl",)
"""Divergences that look into the tail, which mode `top` does not tell: they take `num_head`, how many of the masses are
the head's, and drawn tokens behind them."""
LOSSES_WITHIN_HEAD = ("head_kl",)
"""Divergences that need no mass outside the teacher's head, so a layer whose tail is `unknown` does."""
LABEL_LOSSES = ("reverse_kl", "skew_reverse_kl", "jsd")
"""Divergences with an expectation over the student, whose own tokens may lie outside of the teacher's head."""


def unfit(name: str, mode: str, *, by_entropy: bool = False) -> str | None:
    """Say why a divergence cannot be taken on targets of a capture's mode; None where it can.

    What a layer's tail allows, `shared.cache.layer_choice.loss_problem` says.

    >>> unfit("tail_weighted_kl", "top")
    "mode 'top', which does not tell the shape of the tail; use forward_kl, or capture in mode 'top+sample'"
    >>> unfit("tail_weighted_kl", "top+sample")
    """
    if mode == "sample" and name not in TAKES_DRAWS_ALONE:
        why = "it is biased, since a token that was not drawn would count as impossible"
        return f"mode 'sample', where {why}; use forward_kl, or a layer captured in mode 'top' or 'top+sample'"
    if mode == "sample" and by_entropy:
        return "mode 'sample', which does not tell the teacher's entropy; leave `weigh` out, or capture a head"
    if mode == "top" and name in NEEDS_DRAWS:
        return "mode 'top', which does not tell the shape of the tail; use forward_kl, or capture in mode 'top+sample'"
    return None


_Kind = (
    CrossEntropy
    | Divergence
    | JensenShannon
    | SkewKL
    | TailWeightedKL
    | DecoupledKL
    | LikelihoodMatching
    | HiddenStates
    | Attention
    | Contrastive
)
"""Every kind of term; a new kind is one line here, a new name of a kind one word in its Literal."""
LOSSES: tuple[type[LossTerm], ...] = get_args(_Kind)
LOSSES_ON_HIDDEN_LAYER = tuple(name for kind in LOSSES if issubclass(kind, OnHiddenLayer) for name in names_of(kind))
"""Losses that read a hidden layer of the cache instead of a targets layer."""

LOSS_KINDS = Kinds(_Kind, "name", ("temperature", "beta", "skew", "metric", "normalise", "layer_map", "tau"))
Loss = Annotated[_Kind, Field(discriminator="name"), BeforeValidator(LOSS_KINDS.checked)]
"""Any of them."""


def _map_problems(layer_map: Mapping[str, StudentLayer] | None, *, has_final: bool) -> Iterator[Problem]:
    expected = "a number from 1, or 'final'" if has_final else "a number from 1"
    for teacher, student in (layer_map or {}).items():
        if not (teacher.isdecimal() and int(teacher) > 0) and not (has_final and teacher == "final"):
            yield ("layer_map",), f"'{teacher}' is no layer of a teacher; write {expected}"
        if student == "final" and not has_final:
            yield ("layer_map",), "'final' is a state and has no attention; write a number from 1"
    if layer_map is not None and not layer_map:
        yield ("layer_map",), "maps no layer; leave it out to map every stored one"

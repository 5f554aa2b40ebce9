"""Loss terms of one step, checked and grouped: terms of a group share one softmax over the vocabulary.

A group is a teacher, a temperature and a way to see the tail. Divergences that are linear in the teacher take the tail
from drawn tokens where there are any: right on average. The others would take a token that was not drawn for an
impossible one, so they see head and bucket, as on a layer without draws; where there is no head either (mode `sample`),
they are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shared.errors import TrainingError
from shared.recipe.sections.losses import LOSSES_WITHIN_HEAD, NEEDS_DRAWS, TAKES_DRAWS_ALONE, unfit
from student_train.batch.target_batch import TargetBatch
from student_train.losses import Divergence, Likelihood, LossTerm, divergences
from student_train.losses.entropy_weight import entropy_weights

Targets = TargetBatch | Mapping[str, TargetBatch] | None
"""Of a batch: one teacher's, several teachers' by the `layer` of their terms (one that no position is taught by may be
missing), or none."""


@dataclass(frozen=True, slots=True)
class WeightedDivergence:
    """A divergence with its options bound, and the place of its value among all terms."""

    index: int
    function: Callable[..., Tensor]
    coefficient: Tensor | float
    """Weight x T^2 / positions of the global batch."""
    on_labels: bool
    splits_tail: bool = False
    by_entropy: bool = False

    def values(self, log_p: Tensor, log_q: Tensor, num_head: int) -> Tensor:
        """Return [C] values in nats of log-masses [C, M], of which the first `num_head` are the head's."""
        found = self.function(log_p, log_q, **({"num_head": num_head} if self.splits_tail else {}))
        return found * entropy_weights(log_p, num_head) if self.by_entropy else found


@dataclass(frozen=True, slots=True)
class TermGroup:
    """Terms that share one softmax."""

    targets: TargetBatch | None
    temperature: float
    with_draws: bool
    """The tail's mass goes to drawn tokens, where there are any."""
    terms: list[WeightedDivergence]

    @property
    def needs_members(self) -> bool:
        """Say whether any term looks at the teacher."""
        return not all(term.on_labels for term in self.terms)

    @property
    def positions(self) -> Tensor | None:
        """[S_l] ascending positions of the batch that it is about; None for all."""
        return None if self.targets is None else self.targets.positions


def term_keys(terms: Sequence[LossTerm]) -> list[str]:
    """Return a unique key per term: its name, with its teacher's layer where there are several, and with _2, _3 ...
    where a name comes again.

    >>> term_keys([LossTerm("forward_kl"), LossTerm("cross_entropy"), LossTerm("forward_kl", temperature=2.0)])
    ['forward_kl', 'cross_entropy', 'forward_kl_2']
    >>> term_keys([LossTerm("forward_kl", layer="math"), LossTerm("forward_kl", layer="code")])
    ['forward_kl@math', 'forward_kl@code']
    """
    names = [f"{term.name}@{term.layer}" if term.layer else term.name for term in terms]
    return [name if name not in names[:i] else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def group_terms(terms: Sequence[LossTerm], targets: Targets, num_positions: float | Tensor) -> list[TermGroup]:
    """Return the terms in groups that share a softmax; cross-entropy joins any group of all positions at temperature 1.

    A term of a teacher that no position of the batch is taught by is in none.

    Raises:
        TrainingError: there is no term, or one cannot be honoured: unknown name or option, a temperature that was not
            captured, a divergence that these targets cannot give.
    """
    if not terms:
        raise TrainingError("a stage without losses has nothing to train; name at least one")
    groups: dict[tuple[str, float, bool], TermGroup] = {}
    divergences_of = [_divergence(term) for term in terms]
    for index in sorted(range(len(terms)), key=lambda i: divergences_of[i].on_labels):
        term, divergence = terms[index], divergences_of[index]
        batch: TargetBatch | None = None
        key = ("", 1.0, False)
        if divergence.on_labels:
            key = next((have for have, group in groups.items() if have[1] == 1.0 and group.positions is None), key)
        else:
            batch = targets_of(term, targets)
            if batch is None:
                continue
            _check_fits(term, batch)
            key = (term.layer, term.temperature, term.name in TAKES_DRAWS_ALONE and bool(batch.draws))
        coefficient = term.weight * term.temperature**2 / num_positions
        function = functools.partial(divergence.function, **term.options)
        group = groups.setdefault(key, TermGroup(batch, *key[1:], []))
        group.terms.append(
            WeightedDivergence(
                index, function, coefficient, divergence.on_labels, term.name in NEEDS_DRAWS, term.by_entropy
            )
        )
    return list(groups.values())


def check_term(term: LossTerm, loss: Divergence | Likelihood) -> None:
    """Check that a loss has what a term asks for.

    Raises:
        TrainingError: it has no such option; or it has no temperature, or no entropy to be weighted by, and is given
            one.
    """
    unknown = set(term.options) - set(loss.options)
    if unknown:
        takes = ", ".join(loss.options) or "none"
        raise TrainingError(
            f"loss '{term.name}' was given the option '{min(unknown)}', which it does not have; it takes {takes}"
        )
    if isinstance(loss, Divergence) and not loss.on_labels:
        return
    if term.temperature != 1.0:
        raise TrainingError(
            f"{term.name} was asked for at temperature {term.temperature:g}; it is taken at 1, so leave it out"
        )
    if term.by_entropy:
        raise TrainingError(f"{term.name} was to be weighted by the teacher's entropy; only divergences are, so do not")


def targets_of(term: LossTerm, targets: Targets) -> TargetBatch | None:
    """Return the targets of a term's teacher; None where it teaches no position of the batch.

    Raises:
        TrainingError: the batch has no targets, or the term does not say from which of several teachers it is.
    """
    if targets is None:
        raise TrainingError(
            f"loss '{term.name}' needs the teacher's targets and the batch has none; name a targets layer"
        )
    if not isinstance(targets, Mapping):
        return targets
    if not term.layer:
        raise TrainingError(f"loss '{term.name}' does not say from which of several teachers it is; set its `layer`")
    return targets.get(term.layer)


def _divergence(term: LossTerm) -> Divergence:
    """Return the term's divergence, or raise TrainingError where there is none or it has not what the term asks for."""
    divergence = divergences.get(term.name)
    if divergence is None:
        raise TrainingError(f"loss '{term.name}' is unknown; use one of {', '.join(divergences)}")
    check_term(term, divergence)
    return divergence


def _check_fits(term: LossTerm, targets: TargetBatch) -> None:
    """Raise TrainingError where these targets cannot give a divergence."""
    targets.temperature_index(term.temperature)
    within_head = term.name in LOSSES_WITHIN_HEAD
    if not targets.tail_is_known and (term.by_entropy or not within_head):
        what = "weigh: entropy" if within_head else f"loss '{term.name}'"
        raise TrainingError(
            f"{what} needs the teacher's mass outside its head, and that of these targets is not known; use head_kl "
            "and cross_entropy"
        )
    mode = "sample" if targets.has_only_draws else "top+sample" if targets.draws else "top"
    if (why := unfit(term.name, mode, by_entropy=term.by_entropy)) is not None:
        raise TrainingError(f"loss '{term.name}' was asked for on targets of {why}")

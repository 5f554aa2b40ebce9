"""One row's targets as a stage needs them: the first positions, some of the temperatures.

Cost: views of the row's arrays, except for temperatures that are left out.

Shape letters: S supervised positions, N head entries, J captured temperatures, D drawn tokens of one temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shared.errors import TrainingError, UsageError
from shared.payload.narrowing import keep_entries
from shared.payload.ragged import segment_sum
from shared.payload.targets import Draws, SparseTargets
from shared.payload.targets_at import temperature_index


def as_trained(
    targets: SparseTargets, num_positions: int, temperatures: Sequence[float], vocab_size: int
) -> SparseTargets:
    """Return the targets of a row's first positions, at the stage's temperatures and within the tokenizer's vocabulary.

    Raises:
        TrainingError: a temperature was not captured.
    """
    return within_vocabulary(first_positions(at_temperatures(targets, temperatures), num_positions), vocab_size)


def first_positions(targets: SparseTargets, num_positions: int) -> SparseTargets:
    """Return the targets of the first `num_positions` positions."""
    if num_positions >= targets.num_positions:
        return targets
    num_head = int(targets.counts[:num_positions].sum())
    labels = targets.label_logprobs[:num_positions]
    if not _has_member(targets)[num_positions]:  # a chunk of text is cut, and no longer as likely as its label says
        labels = labels.copy()
        labels[-1:] = -np.inf
    return SparseTargets(
        counts=targets.counts[:num_positions],
        ids=targets.ids[:num_head],
        logprobs=targets.logprobs[:num_head],
        label_logprobs=labels,
        tail_logmass=targets.tail_logmass[:num_positions],
        temperatures=targets.temperatures,
        draws=tuple(_first_draws(draws, num_positions) for draws in targets.draws),
    )


def _has_member(targets: SparseTargets) -> NDArray[np.bool_]:
    """Return [S] where the teacher has a head or drawn tokens."""
    found: NDArray[np.bool_] = targets.counts > 0
    for draws in targets.draws:
        found = found | (draws.counts > 0)
    return found


def _first_draws(draws: Draws, num_positions: int) -> Draws:
    num_drawn = int(draws.counts[:num_positions].sum())
    return Draws(draws.counts[:num_positions], draws.ids[:num_drawn], draws.multiplicities[:num_drawn])


def at_temperatures(targets: SparseTargets, wanted: Sequence[float]) -> SparseTargets:
    """Return the targets with only the `wanted` temperatures, which must have been captured.

    Raises:
        TrainingError: one was not captured.
    """
    columns = [temperature_column(targets.temperatures, temperature) for temperature in wanted]
    if len(columns) == len(targets.temperatures):
        return targets
    return replace(
        targets,
        tail_logmass=targets.tail_logmass[:, columns],
        temperatures=tuple(targets.temperatures[j] for j in columns),
        draws=tuple(targets.draws[j] for j in columns) if targets.draws else (),
    )


def temperature_column(captured: Sequence[float], temperature: float) -> int:
    """Return which of the captured temperatures this is.

    Raises:
        TrainingError: none.
    """
    try:
        return temperature_index(tuple(captured), temperature)
    except UsageError:
        listed = ", ".join(f"{value:g}" for value in captured)
        raise TrainingError(
            f"the stage trains at temperature {temperature:g}, which was not captured (captured: {listed}), so the "
            "teacher's tail at it is unknown; train at a captured one, or add it to capture.temperatures and score "
            "another layer"
        ) from None


def within_vocabulary(targets: SparseTargets, vocab_size: int) -> SparseTargets:
    """Return the targets with what lies beyond the tokenizer's vocabulary moved into the tail.

    A teacher's head may be padded beyond its tokenizer, and its padding may reach the top k at a tiny probability.
    """
    inside = targets.ids < vocab_size
    draws = tuple(_draws_within(drawn, vocab_size) for drawn in targets.draws)
    if inside.all():
        return targets if draws == targets.draws else replace(targets, draws=draws)
    return keep_entries(targets, inside, draws)


def _draws_within(draws: Draws, vocab_size: int) -> Draws:
    """Leave out drawn padding; the other draws of the position then carry its tail."""
    inside = draws.ids < vocab_size
    if inside.all():
        return draws
    return Draws(segment_sum(inside.astype(np.int32), draws.counts), draws.ids[inside], draws.multiplicities[inside])

"""Does a round's student still answer like a student? Figures of its answers, and the bounds beyond which it does not.

Counted: answers cut by their length; answers that repeat themselves, of which more than half of the runs of four tokens
came before in the same answer; the mean length beside that of the recipe's cache. Cost: one pass over the round's
answers, microseconds per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.parts.jobs import Job
from shared.parts.records import list_records
from shared.parts.sequences import SequenceRow
from shared.recipe.recipe import Guards
from tools.rounds.one_round import Round

RUN = 4
"""Tokens of a run that may be repeated."""
REPEATING = 0.5
"""An answer repeats itself where more than this share of its runs came before."""


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """What a round's answers are like."""

    answers: int
    cut: float
    """Share that was cut by length."""
    repeating: float
    """Share that repeats itself."""
    repeated: float
    """Mean share of runs that came before in the same answer."""
    mean_tokens: float
    beside_teacher: float
    """Mean length as a multiple of that in the recipe's cache."""

    @property
    def document(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {name: round(value, 6) for name, value in asdict(self).items()}

    def text(self) -> str:
        """Return the figures in a line."""
        return (
            f"{self.answers:,} answers, {self.mean_tokens:.1f} tokens ({self.beside_teacher:.2f} times the teacher's), "
            f"{self.cut:.1%} cut, {self.repeating:.1%} repeat themselves"
        )


def repeated_share(token_ids: NDArray[np.int32]) -> float:
    """Return the share of runs of four tokens that came before: `[1, 2, 3, 4, 1, 2, 3, 4]` -> 0.2 (1 of 5)."""
    if len(token_ids) <= RUN:
        return 0.0
    runs = sliding_window_view(token_ids, RUN)
    return 1.0 - len(np.unique(runs, axis=0)) / len(runs)


def _figures_of(rows: Iterable[SequenceRow], teacher_tokens: float) -> AnswerFigures:
    """Return the figures of answers; `teacher_tokens` is the mean length to compare with."""
    lengths: list[float] = []
    repeated: list[float] = []
    cut = 0
    for row in rows:
        labels = row.labels()
        lengths.append(len(labels))
        cut += row.finish_reason == "length"
        repeated.append(repeated_share(labels))
    number, mean = len(lengths), float(np.mean(lengths or [0.0]))
    return AnswerFigures(
        answers=number,
        cut=cut / max(number, 1),
        repeating=float(np.mean(np.array(repeated or [0.0]) > REPEATING)),
        repeated=float(np.mean(repeated or [0.0])),
        mean_tokens=mean,
        beside_teacher=mean / teacher_tokens,
    )


def round_figures(one: Round) -> AnswerFigures:
    """Return the figures of a round's answers.

    Raises:
        UsageError: the answers are not all there.
        CacheError: a cache cannot be read.
    """
    return job_figures(one.own_cache, one.job(), one.recipe.cache)


def job_figures(own_cache: Path, job: Job, teacher_caches: Iterable[Path]) -> AnswerFigures:
    """Return the figures of a job's answers, their length beside that of the rows of other caches.

    Raises:
        CacheError: a cache cannot be read.
    """
    cache = Cache.open_sequences(own_cache)
    places = [(start, end) for id8, start, end in cache.jobs_of_rows() if id8 == job.id8]
    rows = (cache.sequence(index) for start, end in places for index in range(start, end))
    return _figures_of(rows, _mean_answer_tokens(teacher_caches))


def _mean_answer_tokens(caches: Iterable[Path]) -> float:
    """Return the mean supervised positions of a row in caches, at least 1; reads records alone."""
    records = [record for path in caches for record in list_records(sequences_dir(path))]
    return max(1.0, sum(record.positions for record in records) / max(1, sum(record.rows for record in records)))


def beyond(found: AnswerFigures, bounds: Guards) -> str | None:
    """Say which bound a round's answers break, and which setting moves it; None where they keep within all."""
    if not found.answers:
        return "no prompt was answered; look at the rows that were set aside"
    if found.cut > bounds.cut:
        cut = f"{found.cut:.1%} of the answers were cut by rounds.max_new_tokens, which may be too few"
        return f"{cut}; that is more than guards.cut {bounds.cut:g}"
    if found.repeating > bounds.repeating:
        return (
            f"{found.repeating:.1%} of the answers repeat themselves, more than guards.repeating {bounds.repeating:g}"
        )
    if not bounds.shortest <= found.beside_teacher <= bounds.longest:
        return (
            f"answers have {found.mean_tokens:.1f} tokens on average, {found.beside_teacher:.2f} times the teacher's, "
            f"outside of guards.shortest {bounds.shortest:g} to guards.longest {bounds.longest:g}"
        )
    return None

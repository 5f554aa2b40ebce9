"""Pass 1: every unit of the plan becomes a part of sequences, by asking an engine or by taking over given answers.

No log-probabilities are asked for, so the engine decodes at full speed. Each answer has its own seed from its row_key,
and a unit's rows are committed in the plan's order, so an interrupted build continues as it would have run (where the
engine honours seeds; its provenance says so). What is left to do with an answer (text, spans, keys) is done in the
writer's thread, so that the engine's thread only renders prompts and keeps tokens.
Cost: one unit of prompts and answers per unit in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.cache.writing.cache_writer import CacheWriter
from shared.parts.jobs import Job, PlanRow
from shared.parts.sequences import SequenceRow
from shared.recipe.recipe import Generate
from teacher_cache.engines.protocol import FINISHED, Generated, GenerateRequest
from teacher_cache.passes.feeding import PassContext, feed_units
from teacher_cache.passes.summary import BuildSummary
from teacher_cache.prompts.problems import Problem
from teacher_cache.prompts.sequence_maker import SequenceMaker, UnusableRowError
from teacher_cache.prompts.work_list import conversation_of, request_seed

PROBLEM, TRUNCATED = "problem", "truncated"
"""Kinds of rows that a part leaves out: it could not be used, or it was cut and the recipe drops such."""


@dataclass(slots=True)
class Pass1:
    """What pass 1 works with."""

    cache: CacheWriter
    job: Job
    maker: SequenceMaker
    software: Callable[[], Mapping[str, Any]]
    """What ran, asked once per part."""
    summary: BuildSummary


@dataclass(slots=True)
class _Sequences:
    """The rows of one unit that are done, and those that are set aside."""

    work: Pass1
    number: int
    done: dict[int, SequenceRow] = field(default_factory=dict)
    aside: dict[int, dict[str, Any]] = field(default_factory=dict)
    cut: int = 0
    """Answers cut by length, kept or not."""

    def set_aside(self, index: int, row: PlanRow, reason: str, kind: str = PROBLEM) -> None:
        """Leave one row out."""
        path = conversation_of(row).path
        self.aside[index] = {"path": path, "line": row.line, "source": row.source, "reason": reason, "kind": kind}

    def commit(self, software: Mapping[str, Any]) -> None:
        """Count the unit and commit it."""
        rows = [self.done[index] for index in sorted(self.done)]
        aside = [self.aside[index] for index in sorted(self.aside)]
        summary, work = self.work.summary, self.work
        summary.truncated += self.cut
        summary.dropped += sum(entry["kind"] == TRUNCATED for entry in aside)
        for entry in aside:
            if entry["kind"] == PROBLEM:
                summary.add_problem(Problem(entry["path"], entry["line"], entry["reason"]))
        work.cache.write_sequences(work.job.part_stem(self.number), rows, software, aside)


class _Answer(NamedTuple):
    """What came back for one row; arrays, since a list of numbers takes ten times the memory."""

    row: PlanRow
    prompt_ids: NDArray[np.int32]
    answer_ids: NDArray[np.int32]
    finish_reason: str
    cut_at_stop: bool


class GenerateUnit:
    """One unit of prompts on its way through an engine."""

    def __init__(self, work: Pass1, number: int, settings: Generate, seed: int) -> None:
        """Remember the unit; its rows are read when its first request is pulled."""
        self.number = number
        self._settings = settings
        self._seed = seed
        self._work = work
        self._sequences = _Sequences(work, number)
        self._asked: dict[int, tuple[PlanRow, list[int]]] = {}
        self._answers: dict[int, _Answer] = {}

    def requests(self) -> Iterator[GenerateRequest]:
        """Yield one request per usable row."""
        rows = self._work.job.unit(self.number)
        for index, (row, prompt_ids) in enumerate(zip(rows, self._work.maker.prompts(rows), strict=True)):
            if isinstance(prompt_ids, UnusableRowError):
                self._sequences.set_aside(index, row, str(prompt_ids))
                continue
            self._asked[index] = row, prompt_ids
            ends, seed = self._work.maker.end_token_ids(row), request_seed(row.row_key, self._seed)
            yield GenerateRequest((self.number, index), self.number, prompt_ids, seed, ends)

    def take(self, index: int, result: Generated) -> int:
        """Keep one answer and return its tokens."""
        row, prompt_ids = self._asked.pop(index)
        ids = np.asarray(prompt_ids, dtype=np.int32), np.asarray(result.token_ids, dtype=np.int32)
        self._answers[index] = _Answer(row, *ids, result.finish_reason, result.cut_at_stop)
        return len(result.token_ids)

    def commit(self) -> Callable[[], object]:
        """Return the write that makes the unit's rows and commits them."""
        return partial(self._write, self._work.software())

    def _write(self, software: Mapping[str, Any]) -> None:
        while self._answers:
            self._make_row(*self._answers.popitem())
        self._sequences.commit(software)

    def _make_row(self, index: int, answer: _Answer) -> None:
        if answer.finish_reason not in FINISHED:
            reason = f"the engine ended the answer with {answer.finish_reason[:60]!r}, so it is no whole answer"
            self._sequences.set_aside(index, answer.row, reason)
            return
        if answer.finish_reason == "length":
            self._sequences.cut += 1
            if not self._settings.keep_truncated:
                reason = f"the answer was cut after {len(answer.answer_ids):,} tokens and keep_truncated is off"
                self._sequences.set_aside(index, answer.row, reason, TRUNCATED)
                return
        try:
            made = self._work.maker.answered(
                answer.row,
                answer.prompt_ids.tolist(),
                answer.answer_ids.tolist(),
                answer.finish_reason,
                cut_at_stop=answer.cut_at_stop,
            )
        except UnusableRowError as error:
            self._sequences.set_aside(index, answer.row, str(error))
        else:
            self._sequences.done[index] = made
            self._work.summary.generated.rows += 1
            self._work.summary.generated.positions += made.num_positions


def generate_units(
    work: Pass1,
    units: Sequence[int],
    settings: Generate,
    seed: int,
    serve: Callable[[Iterator[GenerateRequest], Generate], Iterator[Generated]],
    context: PassContext,
) -> None:
    """Let an engine answer the prompts of these units, and commit each."""
    context.progress.start("generate", sum(map(work.job.rows_of, units)))
    feed_units(
        (GenerateUnit(work, number, settings, seed) for number in units),
        lambda requests: serve(requests, settings),
        context,
        work.summary.generated,
    )
    context.progress.finish()


def import_units(work: Pass1, units: Sequence[int], context: PassContext) -> None:
    """Take over the answers that these units' rows have, and commit each unit."""
    figures = work.summary.imported
    context.progress.start("import", sum(map(work.job.rows_of, units)))
    started = time.monotonic()
    for number in units:
        if context.stop.requested:
            break
        sequences = _Sequences(work, number)
        for index, row in enumerate(work.job.unit(number)):
            try:
                made = work.maker.given(row)
            except UnusableRowError as error:
                sequences.set_aside(index, row, str(error))
                continue
            sequences.done[index] = made
            figures.rows += 1
            figures.positions += made.num_positions
            figures.tokens += len(made.token_ids)
            context.progress.advance(1, len(made.token_ids))
        context.writer.submit(partial(sequences.commit, work.software()))
    figures.seconds += time.monotonic() - started
    context.progress.finish()

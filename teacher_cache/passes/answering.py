"""Planning a job and pass 1 over it: what a build and a student's own answers have in common.

A job's prompts are read only if it was never planned; units without a part are answered, or taken over as given.
Cost: that of the prompts and of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shared.cache.writing.cache_writer import CacheWriter
from shared.errors import DecantError
from shared.keys import KeySet, stack_keys
from shared.parts.jobs import Job, PlanRow, committed_keys, create_job
from shared.parts.records import list_records
from shared.progress import BuildProgress
from shared.recipe.recipe import Capture, Recipe, Teacher
from shared.seconds import add_seconds
from teacher_cache.engines import opening
from teacher_cache.engines.protocol import Engine
from teacher_cache.passes.feeding import PassContext
from teacher_cache.passes.generate import Pass1, generate_units, import_units
from teacher_cache.passes.lazy_engine import LazyEngine
from teacher_cache.passes.stop_signal import StopSignal
from teacher_cache.passes.summary import BuildSummary, PassFigures
from teacher_cache.passes.unit_writer import UnitWriter
from teacher_cache.prompts.cache_source import answers_of
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts
from teacher_cache.prompts.sequence_maker import SequenceMaker
from teacher_cache.prompts.work_list import answer_seed, list_rows, require_unchanged
from teacher_cache.teacher.answerer import Answerer
from teacher_cache.teacher.teacher_identity import ran, software


class BuildStoppedError(DecantError):
    """A build was asked to stop (SIGTERM) and did; what was committed stays."""


@dataclass(slots=True)
class Answering:
    """What the steps up to the answers share."""

    recipe: Recipe
    partition: tuple[int, int]
    progress: BuildProgress
    max_set_aside: float
    cache: CacheWriter
    answerer: Answerer
    answering: LazyEngine
    """The engine of pass 1: the teacher's, or another model's."""
    stop: StopSignal
    summary: BuildSummary
    seconds_under: str | None
    """Phase in seconds.json that the time is added to; None: to none."""

    def units_without_part(self, job: Job) -> list[int]:
        """Return this partition's units of pass 1."""
        (index, count), committed = self.partition, {record.stem for record in self.cache.sequence_records()}
        return [unit for unit in range(index, job.num_units, count) if job.part_stem(unit) not in committed]

    def stop_if_asked(self) -> None:
        """End where SIGTERM arrived.

        Raises:
            BuildStoppedError: it did.
        """
        if self.stop.requested:
            where = f"{self.cache.path}: stopped by SIGTERM"
            raise BuildStoppedError(f"{where}; what was committed stays, and the same command again continues")

    @contextmanager
    def pass_context(self, figures: PassFigures) -> Iterator[PassContext]:
        """Yield what a pass works with, and count what its writer took.

        Raises:
            BuildStoppedError: SIGTERM arrived before it or meanwhile.
        """
        self.stop_if_asked()
        with UnitWriter() as writer:
            yield PassContext(writer, self.stop, self.progress)
        figures.count_writer(writer)
        self.stop_if_asked()

    def keep_seconds(self, opened: Iterable[LazyEngine]) -> None:
        """Add what was computed, and the start of the engines, to the seconds of the phase."""
        self.summary.seconds_starting += sum(engine.seconds_starting for engine in opened)
        if self.summary.computed and self.seconds_under is not None:
            add_seconds(self.recipe.output_dir, self.seconds_under, self.summary.seconds)


def announced(opener: Callable[..., Engine], progress: BuildProgress, stop: StopSignal) -> Callable[..., Engine]:
    """Return an opener that first says what it opens: minutes may pass before the first row."""

    def open_it(settings: Teacher, capture: Capture | None, **how: Any) -> Engine:
        progress.note(f"starting engine {settings.engine}: {opening(settings, capture)}")
        return opener(settings, capture, should_stop=lambda: stop.requested, **how)

    return open_it


def listed(work: Answering, ends: list[int | None], problems: Problems) -> Iterator[PlanRow]:
    """Yield a row for each answer that the recipe's prompts ask for."""
    recipe, groups = work.recipe, work.cache.identity.groups
    prompts, key = read_prompts(recipe.prompts, problems), work.answerer.key
    held = _held_rows(work.cache.path / "sequences")
    return list_rows(prompts, recipe.prompts, recipe.generate, recipe.seed, problems, key, groups, ends, held)


def _held_rows(directory: Path) -> Callable[[bytes], bool]:
    """Return whether committed rows have a key; the keys are read when the first is asked for."""

    @cache
    def known() -> KeySet:
        return KeySet(committed_keys(directory, list_records(directory)))

    return lambda key: bool(known().contains(stack_keys([key]))[0])


def plan(
    work: Answering, request: dict[str, Any], rows: Callable[[Problems], Iterable[PlanRow]], way_out: str = ""
) -> Job:
    """Return the job of a request, listing its rows only if it was never planned; `way_out` is for too many bad ones.

    Raises:
        BuildStoppedError: SIGTERM arrived.
        PromptError: too many rows cannot be used, or prompts changed meanwhile.
    """
    summary, problems = work.summary, Problems()

    def counted() -> Iterator[PlanRow]:
        """Pass the rows on; after the last one say what is wrong with all of them."""
        work.progress.start("list", 0)
        for row in rows(problems):
            work.progress.advance(1, 0)
            work.stop_if_asked()
            yield row
        work.progress.finish()
        require_unchanged(work.recipe.prompts, request)
        problems.check(work.max_set_aside, way_out)

    job = create_job(work.cache.path, request, counted(), work.recipe.rows_per_part)
    summary.duplicates = problems.duplicates
    for problem in problems.listed:
        summary.add_problem(problem)
    summary.num_set_aside = problems.total
    summary.notes = problems.notes()
    return job


def make_sequences(work: Answering, job: Job, maker: SequenceMaker, **said: Any) -> None:
    """Pass 1 over this partition's units that have no part; `said` goes into the records of what ran.

    Raises:
        BuildStoppedError: SIGTERM arrived.
    """
    recipe, units = work.recipe, work.units_without_part(job)
    if not units:
        return
    if recipe.generate is None:
        given = {**software(), **answers_of(recipe.prompts)}
        with work.pass_context(work.summary.imported) as context:
            import_units(Pass1(work.cache, job, maker, lambda: given, work.summary), units, context)
        return
    with work.pass_context(work.summary.generated) as context:
        engine = work.answering.get()
        made = {"answers": work.answerer.section.model, **said}
        pass1 = Pass1(work.cache, job, maker, lambda: ran(engine.provenance(), **made), work.summary)
        seed = answer_seed(recipe.generate, recipe.seed)
        generate_units(pass1, units, recipe.generate, seed, engine.generate, context)
        if not work.answerer.is_teacher:
            work.answering.close()  # the teacher gets the machine to itself

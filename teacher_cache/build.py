"""Phase 1 as one job: plan, generate (or take over) answers, score them, commit everything as it is done.

Order: read the teacher's files; compare identities with the cache; plan the job; pass 1 over units without a part; pass
2 over parts without targets. An engine is opened when the first pass needs one, so a build with nothing to do starts
none. Every part is committed alone, so the same command after any interruption does what is missing and nothing twice.
Cost: two engine passes over the tokens; memory for a few units.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shared.cache.layer_choice import serving_layer
from shared.cache.layout import Layer, list_layers, read_header
from shared.cache.writing.cache_writer import CacheWriter, require_same
from shared.cache.writing.layer_writer import HiddenWriter, LayerWriter, RowsWriter, write_layer
from shared.errors import PromptError, UsageError
from shared.identity.identity import SequencesIdentity
from shared.parts.jobs import Job
from shared.parts.records import PartRecord, list_records
from shared.places import origin_of
from shared.progress import NOWHERE, BuildProgress
from shared.recipe.recipe import Capture, Recipe, Teacher
from shared.recipe.sections.teacher import Workers
from shared.seconds import read_seconds
from teacher_cache import engines
from teacher_cache.engines.answer_ends import foreign_ends
from teacher_cache.engines.protocol import Engine
from teacher_cache.passes.answering import Answering, announced, listed, make_sequences, plan
from teacher_cache.passes.generate import PROBLEM
from teacher_cache.passes.hidden_pass import capture_parts, open_hidden_layer
from teacher_cache.passes.lazy_engine import LazyEngine
from teacher_cache.passes.score import parts_to_score, score_parts
from teacher_cache.passes.stop_signal import StopSignal
from teacher_cache.passes.summary import BuildSummary
from teacher_cache.prompts.cache_source import group_rule, require_tokenizer
from teacher_cache.prompts.problems import THRESHOLD, Problem, accepting, too_many
from teacher_cache.prompts.sequence_maker import SequenceMaker
from teacher_cache.prompts.work_list import request_of
from teacher_cache.teacher.answerer import Answerer, key_beside, know_answerer
from teacher_cache.teacher.layer_reuse import capture_of, reuse_line
from teacher_cache.teacher.teacher_identity import (
    KnownTeacher,
    know_teacher,
    layer_identity,
    ran,
    sequences_identity,
    software,
    template_hash,
)


class SetAsideError(PromptError):
    """The build is done, but for more unusable rows than the threshold allows, or units that killed two engines."""

    def __init__(self, message: str, summary: BuildSummary) -> None:
        """Carry the summary of what was done nevertheless."""
        super().__init__(message)
        self.summary = summary


@dataclass(slots=True)
class _Build(Answering):
    """What the steps of one build share."""

    teacher: Teacher
    known: KnownTeacher
    layer: LayerWriter
    hidden: HiddenWriter | None
    """The hidden layer; None where the recipe wants none."""
    engine: LazyEngine

    def parts_without(self, layer: RowsWriter[Any], job: Job | None) -> list[PartRecord]:
        """Return this partition's parts that are there and that a layer lacks; errors as for `parts_to_score`."""
        return parts_to_score(layer, job, self.partition, self.known.max_model_len)


def teach(
    recipe: Recipe,
    partition: tuple[int, int] | None = None,
    progress: BuildProgress | None = None,
    max_set_aside: float = THRESHOLD,
    open_engine: Callable[..., Engine] | None = None,
    seconds_under: str | None = "teach",
    layer_name: str | None = None,
) -> BuildSummary:
    """Build or continue the cache that a recipe describes.

    Args:
        recipe: with `teacher` and one `cache`; without `prompts`, an existing cache is scored.
        partition: this process's share of the plan, (index from 0, count); None for all of it.
        progress: receives rows and tokens as they are done.
        max_set_aside: largest share of unusable rows that is accepted.
        open_engine: opens engines instead of `teacher_cache.engines.open_engine`.
        seconds_under: phase in seconds.json that the time is added to; None: to none.
        layer_name: name of the targets layer; None for the capture's own.

    Raises:
        UsageError: the recipe has no teacher, several caches, or nothing to build from.
        IdentityError: the cache was built with another tokenizer or template.
        SetAsideError: everything is done, but too many rows could not be used, or units killed two engines each.
        BuildStoppedError: SIGTERM arrived.
        DecantError: anything else that stops a build, in one sentence.
    """
    teacher, own_share = _checked(recipe, partition)
    read_seconds(recipe.output_dir)
    known = know_teacher(teacher)
    require_tokenizer(recipe.prompts, known.tokenizer_hash, teacher.model)
    answerer = know_answerer(recipe.generate, teacher, known)
    answering = answerer.known
    maker = SequenceMaker(known.tokenizer, recipe.prompts, known.vocab_size, answering.max_model_len)
    ends = foreign_ends(maker.templates.ends, answering.tokenizer, answering.files.directory, recipe.generate)
    request = _request(recipe, answering, known, ends)  # every file of prompts is found before anything is written
    cache = _open_cache(recipe, known, teacher, renders=request is not None)
    if answerer.is_teacher and request is not None and recipe.generate is not None:
        answerer = replace(answerer, key=key_beside(known.answerer, cache.path))
        request |= {} if answerer.key is None else {"answerer": answerer.key}
    layer, summary = _begin_layer(cache, known, teacher, recipe.capture, layer_name)
    recipe = recipe.model_copy(update={"capture": capture_of(recipe.capture, layer.identity)})
    hidden = _begin_hidden_layer(cache, known, teacher, recipe.capture, summary)
    progress = progress or BuildProgress(NOWHERE)
    for sentence in maker.templates.unread_settings:
        progress.note(sentence)
    with StopSignal() as stop:
        opener = announced(open_engine or engines.open_engine, progress, stop)
        answers, scores = _engines(opener, recipe, known, answerer)
        build = _Build(
            recipe,
            own_share,
            progress,
            max_set_aside,
            cache,
            answerer,
            answers,
            stop,
            summary,
            seconds_under,
            teacher,
            known,
            layer,
            hidden,
            scores,
        )
        job = _run_passes(build, request, ends, maker)
    return _finish(build, job)


def _request(
    recipe: Recipe, answering: KnownTeacher, known: KnownTeacher, ends: list[int | None]
) -> dict[str, Any] | None:
    """Return what a recipe's prompts ask for, answered by `answering`; None without prompts."""
    if not recipe.prompts:
        return None
    generator = answering.generator if recipe.generate else None
    return request_of(recipe, generator, known.tokenizer_hash, answering.max_model_len, ends)


def _engines(
    opener: Callable[..., Engine], recipe: Recipe, known: KnownTeacher, answerer: Answerer
) -> tuple[LazyEngine, LazyEngine]:
    """Return the engine that answers and the one that scores; they are one where the teacher answers itself."""
    assert recipe.teacher is not None
    # the same settings whether or not pass 1 is done, so that a continued build scores alike
    scoring = recipe.teacher.model_copy(update={"max_model_len": known.max_model_len})
    answers_itself = recipe.generate if answerer.is_teacher else None
    scores = LazyEngine(opener, scoring, recipe.capture, answers_itself, known.files.directory)
    if answerer.is_teacher:
        return scores, scores
    return LazyEngine(opener, answerer.section, None, recipe.generate, answerer.known.files.directory), scores


def refuse_other_cache(recipe: Recipe) -> None:
    """Refuse to extend a cache that is there by a teacher with another tokenizer or template; before any work.

    Raises:
        IdentityError: it has another.
        DecantError: the teacher cannot be read.
    """
    if recipe.teacher is not None and (recipe.cache[0] / "cache.json").is_file():
        known = know_teacher(recipe.teacher)
        require_same(recipe.cache[0], _identity(recipe, known, recipe.teacher, renders=bool(recipe.prompts)))


def _open_cache(recipe: Recipe, known: KnownTeacher, teacher: Teacher, *, renders: bool) -> CacheWriter:
    identity = _identity(recipe, known, teacher, renders=renders)
    return CacheWriter.create_or_open(recipe.cache[0], identity, known.tokenizer_files)


def _identity(recipe: Recipe, known: KnownTeacher, teacher: Teacher, *, renders: bool) -> SequencesIdentity:
    path = recipe.cache[0]
    identity = replace(sequences_identity(known, teacher, recipe.generate), groups=group_rule(path, recipe.prompts))
    # where nothing is rendered the teacher's own template does not matter
    template = template_hash(known.tokenizer.chat_template, path) if renders else read_header(path).identity.template
    return replace(identity, template=template)


def _begin_layer(
    cache: CacheWriter, known: KnownTeacher, teacher: Teacher, capture: Capture, name: str | None
) -> tuple[LayerWriter, BuildSummary]:
    """Return the targets layer that serves a capture, and the summary of a build that reuses what is there."""
    before = cache.sequence_records()
    wanted, layers = layer_identity(known, teacher, capture), list_layers(cache.path)
    serving = serving_layer(layers, wanted)
    _require_name(name, serving)
    ran_with = {"engine": teacher.engine, **software()}
    layer = LayerWriter.create_or_open(cache, name, serving.identity if serving else wanted, ran_with, make=False)
    summary = BuildSummary(cache.path, layer.name, sum(record.rows for record in before), len(before))
    summary.groups = cache.identity.groups
    summary.reuse = reuse_line(layers, serving, wanted, summary.reused_rows)
    return layer, summary


def _begin_hidden_layer(
    cache: CacheWriter, known: KnownTeacher, teacher: Teacher, capture: Capture, summary: BuildSummary
) -> HiddenWriter | None:
    """Return the hidden layer that serves a capture, told to the summary; None where the recipe wants none."""
    if capture.hidden is None:
        return None
    hidden = open_hidden_layer(cache, known, teacher, capture.hidden)
    summary.hidden_layer = hidden.name
    summary.hidden_reused_rows = sum(record.rows for record in list_records(hidden.directory))
    return hidden


def _run_passes(
    build: _Build, request: dict[str, Any] | None, ends: list[int | None], maker: SequenceMaker
) -> Job | None:
    """Plan the job, make what is missing of it in up to three passes, and keep the seconds whatever happens."""
    engine, answering = build.engine, build.answering
    try:
        with engine, answering:
            rows = partial(listed, build, ends)
            job = plan(build, request, rows, _GO_ON) if request is not None else None
            if job is not None and build.units_without_part(job):
                maker.templates.require_date()
            if build.teacher.workers is not None:
                _use_many_engines(build, job, build.teacher.workers)
            else:
                if job is not None:
                    make_sequences(build, job, maker)
                _make_targets(build, job)
        if build.hidden is not None:
            _make_hidden(build, job, build.hidden)
    finally:
        build.keep_seconds({engine, answering})
    return job


def _require_name(name: str | None, serving: Layer | None) -> None:
    """Refuse to score once more, under a name, what a layer of another name holds."""
    if name is not None and serving is not None and name not in (serving.short_name, serving.full_name):
        raise UsageError(
            f"what teacher '{name}' would score is held by layer {serving.full_name}; call it so in `targets` and "
            f"leave '{name}' out of `teachers`"
        )


def _checked(recipe: Recipe, partition: tuple[int, int] | None) -> tuple[Teacher, tuple[int, int]]:
    """Return teacher and partition of a recipe that can be built."""
    if recipe.teacher is None:
        raise UsageError("the recipe has no `teacher` section; `teach` needs one to answer or score prompts")
    if len(recipe.cache) != 1:
        raise UsageError(f"the recipe names {len(recipe.cache)} caches; `teach` builds one, so give one under `cache`")
    if not recipe.prompts and not (recipe.cache[0] / "cache.json").is_file():
        raise UsageError(f"the recipe has no `prompts` and there is no cache at {recipe.cache[0]}; give one of both")
    index, count = partition or (0, 1)
    if not 0 <= index < count:
        raise UsageError(f"--partition {index}/{count} does not exist; expected i/n with i from 0 to n - 1")
    refusal = engines.refusal(recipe.teacher, recipe.capture)
    if refusal is not None:
        raise UsageError(refusal)
    return recipe.teacher, (index, count)


def _use_many_engines(build: _Build, job: Job | None, workers: Workers) -> None:
    """Both passes over this partition's units, on the engines of `teacher.workers`."""
    from teacher_cache.cluster.ray_workers import run_units, sequences_tasks, targets_tasks, work_order

    order = work_order(build.recipe, build.layer.name, job.id if job else None, build.known.max_model_len)
    write_layer(build.layer.layer)  # the workers open it
    units = build.units_without_part(job) if job else []
    first = sequences_tasks(job, units, build.recipe) if job else []
    second = targets_tasks(build.parts_without(build.layer, job), job)
    run_units(order, workers, first, second, build.stop, build.progress, build.summary)
    build.stop_if_asked()


def _make_targets(build: _Build, job: Job | None) -> None:
    """Pass 2 over this partition's parts that the layer lacks."""
    records, figures = build.parts_without(build.layer, job), build.summary.scored
    if not records:
        return
    with build.pass_context(figures) as context:
        engine = build.engine.get()
        score_parts(build.layer, records, engine.score, lambda: ran(engine.provenance()), context, figures)


def _make_hidden(build: _Build, job: Job | None, layer: HiddenWriter) -> None:
    """Pass 3 over this partition's parts that the hidden layer lacks; the scoring engine is closed by now."""
    records, figures = build.parts_without(layer, job), build.summary.hidden
    if not records:
        return
    with build.pass_context(figures) as context:
        capture_parts(layer, records, build.teacher, build.known, context, figures)


_GO_ON = ", or let --max-set-aside accept a larger share (`decant plan` counts them)"


def _way_out(build: _Build, id8: str, accepted: float) -> str:
    """Say how to go on without the rows of a job that were set aside, and how to make it anew with them."""
    path = build.cache.path
    again = f"; once mended, `decant cache drop {shlex.quote(str(path))} --job {id8} --yes` lets them be made again"
    return f"--max-set-aside {accepted:g} goes on without them{again if origin_of(path) is None else ''}"


def _finish(build: _Build, job: Job | None) -> BuildSummary:
    """Fill in the state of the cache and judge what the job set aside, in this run or before."""
    summary = build.summary
    records = build.cache.sequence_records()
    summary.rows = sum(record.rows for record in records)
    summary.positions = sum(record.positions for record in records)
    summary.unscored_parts = len(build.layer.missing())
    own = [record for record in records if job is not None and record.id8 == job.id8]
    unusable = [entry for record in own for entry in record.set_aside if entry.get("kind") == PROBLEM]
    total = sum(record.rows + len(record.set_aside) for record in own)
    if too_many(len(unusable), total, build.max_set_aside):
        first = Problem(str(unusable[0]["path"]), int(unusable[0]["line"]), str(unusable[0]["reason"]))
        raise SetAsideError(
            f"{first.sentence()} ({len(unusable):,} of {total:,} rows cannot be used, more than the "
            f"{build.max_set_aside:.0%} that are set aside; the other {summary.rows:,} rows are in the cache); "
            f"{_way_out(build, own[0].id8, accepting(len(unusable), total))}",
            summary,
        )
    if summary.units_set_aside:
        raise SetAsideError(
            f"{len(summary.units_set_aside):,} units were set aside, since each killed two engines, the first: "
            f"{summary.units_set_aside[0]}; everything else is done, and the same command tries them again",
            summary,
        )
    return summary

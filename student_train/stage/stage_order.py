"""Which plan a stage's packs follow: epochs of a fixed mixture, rounds of a scheduled one, or rounds that follow
evaluations.

Also where a stage lies in its run, for schedules that go over all stages: their steps are planned without loading a
model.
Cost: columns of the caches without their tokens, and the plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from shared.cache.layer_choice import hidden_layer_of, named_layer
from shared.errors import TrainingError
from shared.identity.grown import unmoved
from shared.places import named, origin_of
from shared.recipe.recipe import Recipe, Sampling, Stage
from shared.remote.part_store import BOUND_VARIABLE, bound_bytes
from student_train.batch.dataset import CacheList
from student_train.batch.stage_terms import hidden_reads
from student_train.evaluate.heldout_measure import HeldoutSet
from student_train.order.evaluation_sampling import EvaluationSampling
from student_train.order.order import StageRows, Windows
from student_train.order.round_order import RoundPlanner
from student_train.order.scheduled_plan import GrowingPlan, plan_scheduled
from student_train.order.schedules import RunSteps
from student_train.order.stage_plan import StagePlan, plan_stage
from student_train.records.processes import num_processes
from student_train.stage.stage_teachers import teacher_layers
from student_train.stage.student_length import within_positions

REMOTE_WINDOW_PARTS = 8
"""Parts of a window where a cache is read from a URL and the stage says nothing."""


def stage_seed(recipe: Recipe, stage: Stage) -> int:
    """Return the seed of a stage."""
    return recipe.seed if stage.trainer.seed is None else stage.trainer.seed


def open_caches(recipe: Recipe, stage: Stage) -> CacheList:
    """Open what a stage trains on.

    Raises:
        CacheError: a cache cannot be opened or lacks the layer.
        TrainingError: this machine does not keep as many parts of a URL as the stage reads at a time.
    """
    hidden = [stage.hidden or hidden_layer_of(recipe, path) for path in recipe.cache] if hidden_reads(stage) else None
    if isinstance(stage.targets, tuple):
        caches = CacheList.open(recipe.cache, None, with_targets=False, hidden=hidden, recipe=recipe)
        caches.layers = teacher_layers(recipe, stage, caches)
    else:
        layers = [named_layer(recipe, stage.targets, path) for path in recipe.cache]
        caches = CacheList.open(recipe.cache, layers, with_targets=stage.needs_teacher, hidden=hidden, recipe=recipe)
    _check_windows(stage, caches)
    return caches


def _check_windows(stage: Stage, caches: CacheList) -> None:
    """Refuse windows whose parts would drive each other out of this machine's store, to be fetched for every row.

    Raises:
        TrainingError: with what to set.
    """
    size, bound = _window_size(stage, caches), bound_bytes()
    if size is None or not caches.is_remote:
        return
    streams = len(stage.mixture or caches.source_names) if _moves(stage) else 1  # each goes through its own windows
    largest = np.cumsum(np.sort(caches.bytes_to_keep)[::-1])
    needed = int(largest[: size * streams].max(initial=0))
    if needed <= bound:
        return
    fitting = int(np.searchsorted(largest, bound, side="right")) // streams
    of_each = f" of each of {streams} sources" if streams > 1 else ""
    place = next(cache.path for cache in caches.caches if origin_of(cache.path) is not None)
    lower = f"set window_parts to {fitting}, or " if fitting else ""
    raise TrainingError(
        f"stage '{stage.name}' reads windows of {size} parts{of_each} of {named(place)}, up to {needed:,} bytes, where "
        f"{BOUND_VARIABLE} lets this machine keep {bound:,}; {lower}raise {BOUND_VARIABLE} to "
        f"{math.ceil(needed / 1e6) / 1e3:.3f}"
    )


def run_steps(recipe: Recipe, stage: Stage) -> RunSteps | None:
    """Return where a stage lies in its run, or None where none of its schedules goes over the run.

    Raises:
        TrainingError: another stage cannot be planned.
        CacheError: a cache cannot be opened.
    """
    if not stage.goes_over_run:
        return None
    steps = [_num_steps(recipe, other) for other in recipe.stages]
    place = [other.name for other in recipe.stages].index(stage.name)
    return RunSteps(sum(steps[:place]), sum(steps))


def _num_steps(recipe: Recipe, stage: Stage) -> int:
    if stage.trainer.max_steps is not None:
        return stage.trainer.max_steps * (stage.rounds.count if stage.rounds else 1)
    return plan_length(recipe, stage).num_steps


def plan_length(recipe: Recipe, stage: Stage) -> StagePlan:
    """Plan a stage over the rows that are there, scored or not; where its shares move, how long it is and no packs.

    Raises:
        TrainingError: a source is unknown or empty, or nothing is left to train on.
        CacheError: a cache cannot be opened.
    """
    caches = CacheList.open(recipe.cache, None, with_targets=False, recipe=recipe)
    if not _moves(stage):
        return plan_order(recipe, stage, caches, None)
    stage = _readable(recipe, stage, caches)
    return StagePlan.begun(stage.trainer, _planner(recipe, stage, caches), num_processes())


def _moves(stage: Stage) -> bool:
    return stage.sampling is not None or any(share.kind != "constant" for share in (stage.mixture or {}).values())


def plan_order(recipe: Recipe, stage: Stage, caches: CacheList, run: RunSteps | None) -> StagePlan:
    """Plan a stage's packs.

    Raises:
        TrainingError: a source is unknown or empty, or nothing is left to train on.
    """
    stage = _readable(recipe, stage, caches)
    mixture = caches.mixture_codes(stage.mixture)
    if not _moves(stage):
        shares = None if mixture is None else {code: share.value(0.0) for code, share in mixture.items()}
        return plan_stage(stage.trainer, _rows_of(recipe, stage, caches), shares, num_processes())
    planner = _planner(recipe, stage, caches)
    if stage.sampling is None:
        assert mixture is not None
        return plan_scheduled(stage.trainer, planner, mixture, run, num_processes())
    assert stage.evaluate is not None
    return GrowingPlan.begun(
        stage.trainer,
        planner,
        num_processes(),
        planner=planner,
        every_steps=stage.sampling.every_steps or stage.evaluate.every_steps,
        settings=stage.sampling.model_dump_json(exclude=unmoved(stage.sampling, Sampling.NAMES_THE_PLAN)),
    )


def windows_of(stage: Stage, caches: CacheList) -> Windows | None:
    """Return the windows of parts that a stage's rows are taken from; None where all are shuffled together."""
    size = _window_size(stage, caches)
    return None if size is None else Windows(caches.part_numbers, size)


def _window_size(stage: Stage, caches: CacheList) -> int | None:
    """Return how many parts a window has; None where all rows are shuffled together."""
    return stage.window_parts or (REMOTE_WINDOW_PARTS if caches.is_remote else None)


def _readable(recipe: Recipe, stage: Stage, caches: CacheList) -> Stage:
    """Return a stage whose rows are no longer than its student can read."""
    if recipe.student is None or not len(caches):
        return stage
    return within_positions(stage, recipe.student, int(caches.num_tokens.max()))


def evaluation_sampling(
    stage: Stage, plan: StagePlan, caches: CacheList, heldout: HeldoutSet | None
) -> EvaluationSampling | None:
    """Return what moves a stage's shares, where its evaluations do.

    Raises:
        TrainingError: a source has no held-out row, or its shares cannot keep within floor and ceiling.
    """
    rule = stage.sampling
    if rule is None:
        return None
    assert isinstance(plan, GrowingPlan)
    assert heldout is not None
    codes = {caches.source_names[code]: code for code in plan.planner.tokens_per_source}
    unseen = sorted(set(codes) - set(heldout.rows))
    if unseen:
        raise TrainingError(
            f"stage '{stage.name}' samples by evaluation and source '{unseen[0]}' has no held-out row; raise "
            "heldout.fraction, or leave the source out of the mixture"
        )
    if not len(codes) * rule.floor <= 1 <= len(codes) * rule.ceiling:
        raise TrainingError(
            f"stage '{stage.name}' draws from {len(codes)} sources, whose shares cannot sum to 1 between "
            f"sampling.floor {rule.floor:g} and sampling.ceiling {rule.ceiling:g}; lower the floor or raise the ceiling"
        )
    if stage.mixture is None:
        base = {name: float(plan.planner.tokens_per_source[code]) for name, code in codes.items()}
    else:
        base = {name: share.value(0.0) for name, share in stage.mixture.items()}
    return EvaluationSampling(rule, plan, base, codes)


def _planner(recipe: Recipe, stage: Stage, caches: CacheList) -> RoundPlanner:
    """Return what plans a stage's rounds, over the sources that it names, or all that have rows to train on."""
    rows = _rows_of(recipe, stage, caches)
    named: Mapping[int, object] | None = caches.mixture_codes(stage.mixture)
    codes = tuple(np.unique(caches.sources[rows.eligible]).tolist()) if named is None else tuple(named)
    return RoundPlanner(rows, codes)


def _rows_of(recipe: Recipe, stage: Stage, caches: CacheList) -> StageRows:
    return StageRows(
        stage_seed(recipe, stage),
        caches.num_tokens,
        caches.sources,
        stage.trainer.pack_tokens,
        stage.max_length,
        stage.too_long,
        caches.training_rows(recipe.heldout.fraction),
        windows_of(stage, caches),
        caches.source_names,
    )

"""A build on many engines: Ray core actors, one engine each, one call per unit; Ray places and restarts, the commit
rule counts.

The driver plans as a build in one process does, keeps several units in the hands of every engine
(teacher_cache/cluster/unit_board.py),
and adds up what comes back. Rows never pass through it: an engine reads its unit from the plan and commits it to the
cache, so two engines that do the same unit still commit it once. A dead actor is restarted by Ray (`max_restarts=-1`)
and told to load again; an engine that fails at work is ended and restarted the same way.

Stops with a sentence: an engine that cannot load (its settings would fail anywhere), a cache that cannot be written,
and engines that die one after the other without finishing anything.
Cost: a few messages per unit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import EngineError
from shared.parts.jobs import Job
from shared.parts.records import PartRecord
from shared.progress import BuildProgress
from shared.recipe.recipe import Recipe
from shared.recipe.sections.teacher import Workers
from teacher_cache.cluster.cluster_progress import ClusterProgress
from teacher_cache.cluster.head_watch import HeadWatch
from teacher_cache.cluster.ray_cluster import cpus_per_engine, ray_cluster
from teacher_cache.cluster.ray_engine import EngineWorker, Outcome
from teacher_cache.cluster.unit_board import GENERATE, IMPORT, SCORE, UnitBoard, UnitTask
from teacher_cache.cluster.work_order import WorkOrder
from teacher_cache.passes.stop_signal import StopSignal
from teacher_cache.passes.summary import BuildSummary

logger = logging.getLogger(__name__)

HANDED_OVER = ("DECANT_", "VLLM_", "TRANSFORMERS_", "TOKENIZERS_", "HF_HUB_OFFLINE", "HF_HOME")
"""Beginnings of environment variables that engines get too, secrets left out."""
MAX_DEATHS_IN_A_ROW = 10
"""Besides two for each engine; more without one finished unit in between stop the build."""
SECONDS_TO_CLOSE = 15.0
POLL_SECONDS = 0.3
POLLS_PER_RESTART = 50
GAP_SECONDS = 5.0
"""A start that fails sooner met the process before, or none yet."""


def work_order(recipe: Recipe, layer: str, job_id: str | None, max_model_len: int) -> WorkOrder:
    """Return what engines anywhere in the cluster must know to join this build."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(HANDED_OVER) and not name.endswith(("_KEY", "_TOKEN"))
    }
    return WorkOrder(recipe.model_dump(mode="json"), str(Path.cwd()), environment, layer, job_id, max_model_len)


def sequences_tasks(job: Job, units: Sequence[int], recipe: Recipe) -> list[UnitTask]:
    """Return the tasks of pass 1."""
    kind = IMPORT if recipe.generate is None else GENERATE
    return [UnitTask(kind, job.part_stem(unit), unit, job.rows_of(unit)) for unit in units]


def targets_tasks(records: Sequence[PartRecord], job: Job | None) -> list[UnitTask]:
    """Return the tasks of pass 2 over parts that are there; parts of other jobs have no unit number."""
    own = {job.part_stem(unit): unit for unit in range(job.num_units)} if job else {}
    return [UnitTask(SCORE, record.stem, own.get(record.stem, -1), record.rows) for record in records]


def run_units(
    order: WorkOrder,
    workers: Workers,
    sequences: Sequence[UnitTask],
    targets: Sequence[UnitTask],
    stop: StopSignal,
    progress: BuildProgress,
    summary: BuildSummary,
) -> None:
    """Do all units on `workers.count` engines; returns early once a stop is requested.

    Args:
        order: what the engines need.
        workers: how many, and their GPUs.
        sequences: units without a part.
        targets: parts without targets.
        stop: raised on SIGTERM.
        progress: receives rows as they are committed.
        summary: gains figures, restarts and units that were set aside.

    Raises:
        UsageError: Ray is not installed, or this machine has too few GPUs.
        EngineError: an engine cannot load, or engines keep dying.
        DecantError: what an engine met in the cache.
    """
    board = UnitBoard(sequences, targets, workers.count)
    if board.finished:
        return
    cluster_progress = ClusterProgress(board, progress, summary, workers.count)
    with ray_cluster(workers) as ray:
        engines = _Engines(ray, workers, order)
        driver = _Driver(ray, board, engines, cluster_progress)
        try:
            driver.run(stop)
        except Exception:
            if not stop.requested:  # a SIGTERM to the whole process group takes Ray down as well
                raise
        finally:
            cluster_progress.end()
            engines.end()
    summary.engines = workers.count
    summary.units_set_aside = [f"{task.stem} ({task.kind}): {cause}" for task, cause in board.set_aside]


@dataclass(slots=True)
class _Call:
    """A call under way."""

    engine: int
    task: UnitTask | None
    """None: the engine's start."""
    since: float = field(default_factory=time.monotonic)


class _Engines:
    """The actors, by number."""

    def __init__(self, ray: Any, workers: Workers, order: WorkOrder) -> None:
        """Ask Ray to place them."""
        self._ray = ray
        remote = ray.remote(EngineWorker).options(
            num_cpus=cpus_per_engine(ray, workers),
            num_gpus=workers.gpus_per_engine,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=64,
        )
        self._actors = [remote.remote(order) for _ in range(workers.count)]
        self.lives: dict[int, str] = {}
        """Name of the process of each engine that started."""

    def __len__(self) -> int:
        return len(self._actors)

    def start(self, engine: int) -> Any:
        """Let one load its teacher."""
        return self._actors[engine].start.remote()

    def run(self, engine: int, task: UnitTask) -> Any:
        """Give one a unit."""
        return self._actors[engine].run.remote(task)

    def restart(self, engine: int) -> None:
        """End the process of one that is unfit; Ray starts another."""
        self._ray.kill(self._actors[engine], no_restart=False)

    def end(self) -> None:
        """Let all release their teachers, then end their processes; one that never started ends with the connection."""
        started = [self._actors[engine] for engine in self.lives]
        with contextlib.suppress(Exception):  # dead engines have nothing to release
            closing = [actor.close.remote() for actor in started]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=SECONDS_TO_CLOSE)
        for actor in started:
            with contextlib.suppress(Exception):  # gone already
                self._ray.kill(actor, no_restart=True)


class _Driver:
    """Hands out units and takes their outcomes."""

    def __init__(self, ray: Any, board: UnitBoard, engines: _Engines, cluster_progress: ClusterProgress) -> None:
        self._ray = ray
        self._board = board
        self._engines = engines
        self._cluster_progress = cluster_progress
        self._calls: dict[Any, _Call] = {}
        self._ready: set[int] = set()
        self._deaths_in_a_row = 0
        self._polls: Counter[int] = Counter()
        self._down: set[int] = set()
        self._head = HeadWatch(ray.get_runtime_context().gcs_address)

    def run(self, stop: StopSignal) -> None:
        """Work until everything is done or set aside, or a stop is requested."""
        for engine in range(len(self._engines)):
            self._start(engine)
        while not self._board.finished and not stop.requested:
            self._hand_out()
            self._head.look()
            ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                self._receive(self._calls.pop(reference), reference)

    def _hand_out(self) -> None:
        """Fill every engine in turn, so that all get a first unit before one gets a second."""
        handed = True
        while handed:
            handed = False
            for engine in sorted(self._ready):
                task = self._board.take(engine)
                if task is not None:
                    self._calls[self._engines.run(engine, task)] = _Call(engine, task)
                    handed = True

    def _receive(self, call: _Call, reference: Any) -> None:
        """Take one outcome, or the news of a death.

        Raises:
            DecantError: what stops the whole build.
        """
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            if call.task is None and self._in_gap(call):
                self._start(call.engine)
                return
            first = (str(error).strip().splitlines() or ["no more is known"])[0]
            self._died(
                call.engine, f"the engine's process died (killed, crashed or out of memory; Ray says: {first[:200]})"
            )
            return
        if call.task is None:
            self._started(call.engine, outcome)
        elif outcome.error is None:
            assert outcome.figures is not None
            self._deaths_in_a_row = 0
            self._board.done(call.engine, call.task)
            self._cluster_progress.done(call.task, outcome.figures)
        elif isinstance(outcome.error, EngineError):
            self._engines.restart(call.engine)
            self._died(call.engine, str(outcome.error))
        else:
            raise outcome.error

    def _started(self, engine: int, outcome: Outcome) -> None:
        """Count an engine in, unless it is the process that is about to end."""
        if outcome.error is not None:
            raise outcome.error
        if self._engines.lives.get(engine) == outcome.life:
            self._polls[engine] += 1
            if (
                self._polls[engine] % POLLS_PER_RESTART == 0
            ):  # it was out of reach for a while, but lives on with units taken back
                self._engines.restart(engine)
            time.sleep(POLL_SECONDS)
            self._start(engine)
            return
        self._down.discard(engine)
        self._polls[engine] = 0
        self._engines.lives[engine] = outcome.life
        self._ready.add(engine)
        self._cluster_progress.started()

    def _died(self, engine: int, cause: str) -> None:
        """Take back an engine's units and have it load again.

        Raises:
            EngineError: engines keep dying and nothing gets done.
        """
        self._ready.discard(engine)
        self._calls = {reference: call for reference, call in self._calls.items() if call.engine != engine}
        lost = self._board.died(engine, cause)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MAX_DEATHS_IN_A_ROW + 2 * len(self._engines):
            raise EngineError(
                f"engines died {self._deaths_in_a_row} times without finishing a unit, the last one because {cause}; "
                "see to that, then run the same command again to continue"
            )
        self._fell(engine)
        if self._board.finished:
            return
        logger.warning("engine %d: %s; it is restarted and its %d units are handed out again", engine, cause, len(lost))
        self._start(engine)

    def _in_gap(self, call: _Call) -> bool:
        """Tell whether a start failed only because the process before was still being replaced."""
        self._fell(call.engine)
        self._polls[call.engine] += 1
        return time.monotonic() - call.since < GAP_SECONDS and self._polls[call.engine] % POLLS_PER_RESTART != 0

    def _fell(self, engine: int) -> None:
        """Count a death once, however many calls tell of it."""
        if engine not in self._down:
            self._down.add(engine)
            self._cluster_progress.died()

    def _start(self, engine: int) -> None:
        self._calls[self._engines.start(engine)] = _Call(engine, None)

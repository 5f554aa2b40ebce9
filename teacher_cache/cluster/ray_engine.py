"""One engine of many: what runs inside a Ray actor, one call per unit, any number of calls at a time.

Calls put their unit into a queue and wait. One thread owns the engine: it feeds units of one kind continuously, as a
build in one process does, ends the stream where the queue is empty or the kind changes, and begins another. Each unit
is committed by the ordinary rule and reported with its own figures. Ray itself is not imported here.

What goes wrong: an error of the engine leaves it unfit, so everything that it held comes back as failed and the caller
has it restarted; an error of the cache (a full disk, a damaged part) stops the job. Anything else is a defect and is
raised.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from shared.cache.layout import sequences_dir
from shared.errors import DecantError, EngineError, reason_of
from shared.parts.records import read_record
from shared.process.failpoints import failpoint
from shared.progress import NOWHERE, BuildProgress
from teacher_cache.cluster.unit_board import GENERATE, IMPORT, UnitTask
from teacher_cache.cluster.work_order import Loaded, WorkOrder, load_order
from teacher_cache.passes.feeding import PassContext, Unit, feed_units
from teacher_cache.passes.generate import GenerateUnit, Pass1, import_units
from teacher_cache.passes.score import ScoreUnit
from teacher_cache.passes.stop_signal import StopSignal
from teacher_cache.passes.summary import BuildSummary, PassFigures
from teacher_cache.passes.unit_writer import UnitWriter
from teacher_cache.prompts.cache_source import answers_of
from teacher_cache.prompts.work_list import answer_seed
from teacher_cache.teacher.teacher_identity import ran, software

LIFE = secrets.token_hex(8)
"""Names this process among all that an actor has had."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one unit, or of starting (then without figures)."""

    life: str
    """Names the process that answers."""
    figures: BuildSummary | None = None
    """This unit's alone."""
    error: DecantError | None = None
    """What stopped it; an EngineError concerns this engine, any other the whole job."""


@dataclass(slots=True)
class _Waiting:
    """A unit whose caller waits."""

    task: UnitTask
    reply: Future[Outcome] = field(default_factory=Future)


Reply = Callable[[_Waiting, BuildSummary], None]


class _Tracked:
    """A unit that keeps its own figures and answers its caller once it is committed."""

    def __init__(self, unit: Unit, waiting: _Waiting, figures: BuildSummary, reply: Reply) -> None:
        self.number = unit.number
        self._unit = unit
        self._waiting = waiting
        self._figures = figures
        self._reply = reply

    def requests(self) -> Iterator[Any]:
        failpoint(f"engine.unit_{self._waiting.task.unit}")
        return self._unit.requests()

    def take(self, index: int, result: Any) -> int:
        tokens = self._unit.take(index, result)
        self._figures.passes[self._waiting.task.kind].tokens += tokens
        return tokens

    def commit(self) -> Callable[[], object]:
        return partial(_commit, self._unit.commit(), self._waiting, self._figures, self._reply)


def _commit(write: Callable[[], object], waiting: _Waiting, figures: BuildSummary, reply: Reply) -> None:
    started = time.monotonic()
    try:
        write()
    except DecantError as error:
        waiting.reply.set_result(Outcome(LIFE, error=error))
        raise
    except Exception as error:
        waiting.reply.set_exception(error)
        raise
    figures.passes[waiting.task.kind].seconds_writing = time.monotonic() - started
    reply(waiting, figures)


class EngineWorker:
    """An engine that is given units; methods may be called from any number of threads."""

    def __init__(self, order: WorkOrder) -> None:
        """Remember the order; nothing is loaded before `start`."""
        self._order = order
        self._queue: queue.Queue[_Waiting | None] = queue.Queue()
        self._next: _Waiting | None = None
        self._open: dict[UnitTask, _Waiting] = {}
        self._stop = StopSignal()
        self._started: Future[Outcome] = Future()
        self._numbers = count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> Outcome:
        """Load the teacher and wait for it; safe to call again."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="decant-engine", daemon=True)
                self._thread.start()
        return self._started.result()

    def run(self, task: UnitTask) -> Outcome:
        """Work on one unit, and return once it is committed or cannot be."""
        waiting = _Waiting(task)
        self._queue.put(waiting)
        return waiting.reply.result()

    def close(self) -> None:
        """Abandon what is at work and release the engine."""
        self._stop.requested = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        """Own the engine from start to end."""
        try:
            loaded = load_order(self._order, lambda: self._stop.requested)
        except DecantError as error:
            self._started.set_result(Outcome(LIFE, error=error))
            return
        except Exception as error:  # noqa: BLE001 - raised again where the caller waits
            self._started.set_exception(error)
            return
        self._started.set_result(Outcome(LIFE))
        try:
            with UnitWriter() as writer:
                context = PassContext(writer, self._stop, BuildProgress(NOWHERE))
                while (first := self._following(wait=True)) is not None:
                    self._serve(loaded, first, context)
        except DecantError as error:
            self._fail_all(error)
        except Exception as error:  # noqa: BLE001 - whatever a library raises leaves the engine unfit
            self._fail_all(EngineError(f"the engine failed while at work ({type(error).__name__}: {reason_of(error)})"))
        finally:
            loaded.engine.close()

    def _following(self, *, wait: bool) -> _Waiting | None:
        """Return the next unit, or None: at the end, or, without `wait`, where no unit is there."""
        if self._next is not None:
            found, self._next = self._next, None
            return found
        try:
            waiting = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if waiting is None:
            self._queue.put(None)  # the end stays the end
            return None
        self._open[waiting.task] = waiting
        return waiting

    def _stream(self, first: _Waiting) -> Iterator[_Waiting]:
        """Yield units of one kind for as long as there are any."""
        following: _Waiting | None = first
        while following is not None and following.task.kind == first.task.kind:
            yield following
            following = self._following(wait=False)
        self._next = following

    def _serve(self, loaded: Loaded, first: _Waiting, context: PassContext) -> None:
        """Work through a stream of units of one kind."""
        kind = first.task.kind
        if kind == IMPORT:
            for waiting in self._stream(first):
                self._import(loaded, waiting, context)
            return
        figures = PassFigures()
        told = (0.0, context.writer.seconds_full)

        def reply(waiting: _Waiting, own: BuildSummary) -> None:
            nonlocal told
            now, its = (figures.seconds_in_engine, context.writer.seconds_full), own.passes[kind]
            its.seconds_in_engine, its.seconds_waiting = now[0] - told[0], now[1] - told[1]
            told = now
            self._reply(waiting, own)

        generate = loaded.recipe.generate
        make = self._generate_unit if kind == GENERATE else self._score_unit
        units: Iterable[Unit] = (make(loaded, waiting, reply) for waiting in self._stream(first))
        if kind == GENERATE:
            assert generate is not None
            feed_units(units, lambda requests: loaded.engine.generate(requests, generate), context, figures)
        else:
            feed_units(units, loaded.engine.score, context, figures)

    def _generate_unit(self, loaded: Loaded, waiting: _Waiting, reply: Reply) -> _Tracked:
        generate = loaded.recipe.generate
        assert generate is not None
        work = _pass1(loaded, lambda: ran(loaded.engine.provenance(), answers=loaded.teacher.model))
        unit = GenerateUnit(work, waiting.task.unit, generate, answer_seed(generate, loaded.recipe.seed))
        return _Tracked(unit, waiting, work.summary, reply)

    def _score_unit(self, loaded: Loaded, waiting: _Waiting, reply: Reply) -> _Tracked:
        own = _figures(loaded)
        record = read_record(sequences_dir(loaded.cache.path) / f"{waiting.task.stem}.json")
        unit = ScoreUnit(next(self._numbers), record, loaded.layer, lambda: ran(loaded.engine.provenance()), own.scored)
        return _Tracked(unit, waiting, own, reply)

    def _import(self, loaded: Loaded, waiting: _Waiting, context: PassContext) -> None:
        """Take over given answers; no engine is asked."""
        failpoint(f"engine.unit_{waiting.task.unit}")
        work = _pass1(loaded, lambda: {**software(), **answers_of(loaded.recipe.prompts)})
        with UnitWriter() as writer:
            import_units(work, [waiting.task.unit], PassContext(writer, context.stop, context.progress))
        work.summary.imported.seconds_writing = writer.seconds
        if not context.stop.requested:
            self._reply(waiting, work.summary)

    def _reply(self, waiting: _Waiting, own: BuildSummary) -> None:
        self._open.pop(waiting.task, None)
        waiting.reply.set_result(Outcome(LIFE, own))

    def _fail_all(self, error: DecantError) -> None:
        """Answer every caller, those that come later too."""
        while True:
            for waiting in list(self._open.values()):
                if not waiting.reply.done():
                    waiting.reply.set_result(Outcome(LIFE, error=error))
            self._open.clear()
            if self._following(wait=True) is None:
                return


def _pass1(loaded: Loaded, what_ran: Callable[[], Mapping[str, Any]]) -> Pass1:
    assert loaded.job is not None
    return Pass1(loaded.cache, loaded.job, loaded.maker, what_ran, _figures(loaded))


def _figures(loaded: Loaded) -> BuildSummary:
    return BuildSummary(loaded.cache.path, loaded.layer.name)

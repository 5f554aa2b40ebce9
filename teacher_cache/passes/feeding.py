"""Feed an engine continuously across units, and hand each unit on once all its rows are back.

The engine pulls requests lazily, so requests of the next unit enter while the last of this one finish. A unit is
complete when all its requests were pulled and all its results came; a unit without a request is complete at once. What
is complete goes to the writer thread, whose failure stops the feeding at the next result.
Cost: bookkeeping only; at most the engine's rows in flight plus one unit are open.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from shared.errors import EngineError
from shared.progress import BuildProgress
from teacher_cache.passes.stop_signal import StopSignal
from teacher_cache.passes.summary import PassFigures
from teacher_cache.passes.unit_writer import UnitWriter


class Unit(Protocol):
    """What is fed: requests tagged (number, index), and a place for their results."""

    number: int

    def requests(self) -> Iterator[Any]:
        """Yield the unit's requests; rows that cannot be asked for are kept back."""

    def take(self, index: int, result: Any) -> int:
        """Keep a result and return the tokens that it cost."""

    def commit(self) -> Callable[[], object]:
        """Return the write that commits the unit; called once, when all results are in."""


@dataclass(slots=True)
class PassContext:
    """What a pass works with."""

    writer: UnitWriter
    stop: StopSignal
    progress: BuildProgress


@dataclass(slots=True)
class _Open:
    unit: Unit
    waiting: int = 0
    fed: bool = False


@dataclass(slots=True)
class _Feed:
    """The request stream, with the time that making requests takes."""

    units: Iterable[Unit]
    stop: StopSignal
    open: dict[int, _Open] = field(default_factory=dict)
    complete: deque[Unit] = field(default_factory=deque)
    seconds: float = 0.0

    def __iter__(self) -> Iterator[Any]:
        stream = self._stream()
        while True:
            started = time.monotonic()
            request = next(stream, None)
            self.seconds += time.monotonic() - started
            if request is None:
                return
            yield request

    def _stream(self) -> Iterator[Any]:
        for unit in self.units:
            entry = self.open[unit.number] = _Open(unit)
            for request in unit.requests():
                if self.stop.requested:
                    return
                entry.waiting += 1
                yield request
            entry.fed = True
            self._settle(entry)

    def take(self, number: int, index: int, result: Any) -> int:
        """Hand a result to its unit, complete once nothing of it is missing; return the tokens that it cost."""
        entry = self.open[number]
        entry.waiting -= 1
        tokens = entry.unit.take(index, result)
        self._settle(entry)
        return tokens

    def _settle(self, entry: _Open) -> None:
        if entry.fed and entry.waiting == 0:
            self.complete.append(self.open.pop(entry.unit.number).unit)


def feed_units(
    units: Iterable[Unit], serve: Callable[[Iterator[Any]], Iterator[Any]], context: PassContext, figures: PassFigures
) -> None:
    """Run every unit through an engine and queue its commit; return early once a stop is requested.

    Args:
        units: in order; pulled lazily.
        serve: the engine's `generate` or `score`.
        context: writer, stop flag and progress.
        figures: gains tokens, seconds and seconds in the engine.

    Raises:
        EngineError: the engine ended before every row came back.
        DecantError: whatever engine or writer raised.
    """
    feed = _Feed(units, context.stop)
    started = time.monotonic()
    results = iter(serve(iter(feed)))
    try:
        while not context.stop.requested:
            before, feeding = time.monotonic(), feed.seconds
            result = next(results, None)
            figures.seconds_in_engine += time.monotonic() - before - (feed.seconds - feeding)
            if result is not None:
                number, index = result.tag
                tokens = feed.take(number, index, result)
                figures.tokens += tokens
                context.progress.advance(1, tokens)
            while feed.complete:
                context.writer.submit(feed.complete.popleft().commit())
            context.writer.check()
            if result is None:
                break
        else:
            return
        if feed.open and not context.stop.requested:
            rows = sum(entry.waiting for entry in feed.open.values())
            raise EngineError(f"the engine ended with {rows:,} rows unanswered; run the same command again to continue")
    except Exception:
        if not context.stop.requested:  # a SIGTERM to the whole process group takes the engine's processes down as well
            raise
    finally:
        close = getattr(results, "close", None)
        if close is not None:
            close()
        figures.seconds += time.monotonic() - started

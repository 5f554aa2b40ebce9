"""Which engine works on which unit, and what becomes of a unit whose engine dies: the plan of a build on many engines.

Pure bookkeeping, without Ray. Each engine holds several units at once, so that it is never drained between two: at
least two, more where parts are small, fewer each towards the end, so that no engine hoards the rest. Answering goes
before scoring; a unit can be scored as soon as its answers are committed.

An engine that dies does not say which of its units killed it. All that it held are suspects: they are handed out again
after everything else, each alone on an engine. The one whose engine dies again has killed two and is set aside; the
others were bystanders.
Cost: a few dictionaries of the units that are not done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

GENERATE, IMPORT, SCORE = "generate", "import", "score"
MIN_HELD, MAX_HELD = 2, 8
ROWS_HELD = 1024
"""Rows that an engine should have before it beside the unit that it works on: twice what vLLM keeps in flight."""


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One unit in one pass."""

    kind: str
    """generate | import | score"""
    stem: str
    """The unit's part."""
    unit: int
    """Number in the job's plan; -1 for the part of another job, which is only scored."""
    rows: int


class UnitBoard:
    """What is to do, who does what, and what was set aside."""

    def __init__(self, sequences: Iterable[UnitTask], targets: Iterable[UnitTask], num_engines: int) -> None:
        """Take the units without answers, the parts without targets, and how many engines there will be."""
        self._sequences = deque(sequences)
        self._targets = deque(targets)
        self._suspects: deque[UnitTask] = deque()
        self._held: dict[int, list[UnitTask]] = {engine: [] for engine in range(num_engines)}
        self._causes: dict[UnitTask, str] = {}
        rows_per_part = max((task.rows for task in chain(self._sequences, self._targets)), default=1)
        self._most_held = min(MAX_HELD, MIN_HELD + -(-ROWS_HELD // max(1, rows_per_part)))
        self.set_aside: list[tuple[UnitTask, str]] = []
        """Units that killed two engines, with what the second died of."""

    @property
    def finished(self) -> bool:
        """Whether every unit is done or set aside."""
        return not (self._sequences or self._targets or self._suspects or any(self._held.values()))

    @property
    def pass_under_way(self) -> str:
        """Kind of the first pass that is not done."""
        return next((task.kind for task in self._left() if task.kind != SCORE), SCORE)

    def rows_left(self, kind: str) -> int:
        """Count the rows of one pass that are not done."""
        return sum(task.rows for task in self._left() if task.kind == kind)

    def _left(self) -> Iterator[UnitTask]:
        return chain(self._sequences, self._suspects, *self._held.values(), self._targets)

    def take(self, engine: int) -> UnitTask | None:
        """Hand one more unit to an engine; None while it has enough, holds a suspect, or nothing is left for it."""
        held = self._held[engine]
        if any(task in self._causes for task in held) or len(held) >= self._room():
            return None
        queue = self._sequences or self._targets or (self._suspects if not held else None)
        if not queue:
            return None
        held.append(queue.popleft())
        return held[-1]

    def done(self, engine: int, task: UnitTask) -> None:
        """Count a unit as committed; what was answered can be scored."""
        self._held[engine].remove(task)
        if task.kind != SCORE:
            self._targets.append(UnitTask(SCORE, task.stem, task.unit, task.rows))

    def died(self, engine: int, cause: str) -> list[UnitTask]:
        """Take back what a dead engine held, and return it: suspects, or set aside where it was the second death."""
        held, self._held[engine] = self._held[engine], []
        for task in held:
            if task in self._causes:
                self.set_aside.append((task, cause))
            else:
                self._causes[task] = cause
                self._suspects.append(task)
        return held

    def _room(self) -> int:
        """Return how many units one engine may hold now."""
        share = -(-(len(self._sequences) + len(self._targets)) // len(self._held))
        return max(MIN_HELD, min(self._most_held, share))

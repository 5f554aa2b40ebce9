"""Wall time, progress and figures of a build on many engines, whose passes overlap: answering ends with the last
answered unit.

Rows that are scored before that count for the pass that follows. Cost: a few additions per unit.
"""

from __future__ import annotations

import time

from shared.progress import BuildProgress
from teacher_cache.cluster.unit_board import SCORE, UnitBoard, UnitTask
from teacher_cache.passes.summary import BuildSummary


class ClusterProgress:
    """Follows a build from its first engine to its end."""

    def __init__(self, board: UnitBoard, progress: BuildProgress, summary: BuildSummary, num_engines: int) -> None:
        """Begin to count the start of the engines."""
        self._board = board
        self._progress = progress
        self._summary = summary
        self._num_engines = num_engines
        self._begun = time.monotonic()
        self._since: float | None = None
        self._scored_early = 0
        self._phase = ""

    def started(self) -> None:
        """Note the first engine that is ready."""
        if self._since is None:
            self._since = time.monotonic()
            self._summary.seconds_starting += self._since - self._begun
            self._turn()

    def died(self) -> None:
        """Count a restart; what was set aside may end a pass."""
        self._summary.engine_restarts += 1
        self._turn()

    def done(self, task: UnitTask, figures: BuildSummary) -> None:
        """Add one unit's figures."""
        self._summary.absorb(figures, self._num_engines)
        if task.kind == self._phase:
            self._progress.advance(task.rows, figures.tokens)
        elif task.kind == SCORE:
            self._scored_early += task.rows
        self._turn()

    def end(self) -> None:
        """Close the pass that is under way."""
        self._close()
        self._progress.finish()

    def _turn(self) -> None:
        """Show the pass that is under way."""
        if self._since is None:
            return
        phase = self._board.pass_under_way
        if phase != self._phase:
            self._close()
            self._phase = phase
            self._progress.start(phase, self._board.rows_left(phase) + (self._scored_early if phase == SCORE else 0))
            if phase == SCORE:
                self._progress.advance(self._scored_early, 0)

    def _close(self) -> None:
        if self._since is None or not self._phase:
            return
        now = time.monotonic()
        self._summary.passes[self._phase].seconds += now - self._since
        self._since = now
        self._progress.finish()

"""What training tells a display: a stage begins, steps are done, a line is worth reading."""

from __future__ import annotations

import sys
import time
from typing import Protocol

INTERVAL_SECONDS = 10.0
"""Between two plain lines."""


class StageProgress(Protocol):
    """Display of one stage."""

    def advance(self, units: int = 1, tokens: int = 0, detail: str = "") -> None:
        """Count optimizer steps and tokens that are done now, with what the last step says of itself."""

    def note(self, text: str) -> None:
        """Show a line."""

    def close(self) -> None:
        """Say how far the stage came."""


class OpenProgress(Protocol):
    """Opens the display of a stage."""

    def __call__(self, phase: str, total: int, *, unit: str, done: int) -> StageProgress:
        """Open a display of `total` steps, `done` of which an earlier run did."""


class SilentProgress:
    """Shows nothing: for processes beside the first."""

    def __init__(self, phase: str, total: int, *, unit: str = "steps", done: int = 0) -> None:
        """Take what a display takes."""

    def advance(self, units: int = 1, tokens: int = 0, detail: str = "") -> None:
        """Count nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Close nothing."""


class PlainProgress:
    """A line on standard error every few seconds: steps, tokens per second, time left."""

    def __init__(self, phase: str, total: int, *, unit: str = "steps", done: int = 0) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier run did."""
        self.phase, self.total, self.unit, self.done = phase, total, unit, done
        self._done_before, self._tokens = done, 0
        self._start = self._last = time.monotonic()
        self._detail = ""

    def advance(self, units: int = 1, tokens: int = 0, detail: str = "") -> None:
        """Count optimizer steps and tokens that are done now, with what the last step says of itself."""
        self.done += units
        self._tokens += tokens
        self._detail = f", {detail}" if detail else ""
        if time.monotonic() - self._last >= INTERVAL_SECONDS:
            self._last = time.monotonic()
            self.note(self._line())

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line."""
        self.note(self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = seconds / max(self.done - self._done_before, 1) * (self.total - self.done)
        rate = f"{self._tokens / seconds:,.0f} tokens/s"
        return f"{self.phase}: {self.done:,} of {self.total:,} {self.unit}, {rate}, {left:.0f} s left{self._detail}"

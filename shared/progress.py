"""How far a phase is: a bar on a terminal, a plain line every few seconds elsewhere, always on standard error.

Both say units done, tokens per second and the time left, each over the whole phase, so that a slow start is not
forgotten.
Cost: one clock reading per call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from io import StringIO
from typing import Any, TextIO

from shared.text.printable import printable

INTERVAL_SECONDS = 5.0
"""Between two plain lines."""


class _Nowhere(StringIO):
    """Keeps nothing."""

    def write(self, text: str, /) -> int:
        return len(text)


NOWHERE = _Nowhere()
"""A stream for displays that show nothing, as of processes beside the first."""


class Progress:
    """Progress of one phase; a context manager, safe to close twice."""

    def __init__(
        self,
        phase: str,
        total: int | None,
        *,
        unit: str = "rows",
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Announce a phase of `total` units (None: unknown), `done` of which an earlier run did."""
        self.phase = phase
        self.total = total
        self.unit = unit
        self.done = done
        self.tokens = 0
        self._done_before = done
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._last = clock()
        self._closed = False
        self._detail = ""
        self._bar = _bar(phase, total, unit, done, self._stream) if self._stream.isatty() else None
        if self._bar is None:
            self._print()

    def advance(self, units: int = 1, tokens: int = 0, detail: str = "") -> None:
        """Count units and tokens that are done now, with what the last of them says of itself."""
        self._detail = detail
        self.done += units
        self.tokens += tokens
        if self._bar is not None:
            postfix = ", ".join(filter(None, (f"{self.tokens_per_second():,.0f} tokens/s", detail)))
            self._bar.set_postfix_str(printable(postfix), refresh=False)
            self._bar.update(units)
        elif self._clock() - self._last >= INTERVAL_SECONDS:
            self._print()

    def note(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Say how far it came."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        else:
            self._print()

    def tokens_per_second(self) -> float:
        """Return tokens per second of this run."""
        return self.tokens / max(self._clock() - self._start, 1e-9)

    def line(self) -> str:
        """Return the plain line."""
        seconds = self._clock() - self._start
        parts = [
            f"{self.done:,} of {self.total:,} {self.unit}" if self.total is not None else f"{self.done:,} {self.unit}"
        ]
        if self.tokens:
            parts.append(f"{self.tokens_per_second():,.0f} tokens/s")
        made = self.done - self._done_before
        if self._closed:
            parts.append(f"{duration(seconds)}")
        elif self.total is not None and made > 0:
            parts.append(f"{duration(seconds / made * max(self.total - self.done, 0))} left")
        parts += [self._detail] if self._detail else []
        return f"{self.phase}: {', '.join(parts)}"

    def _print(self) -> None:
        self._last = self._clock()
        print(printable(self.line()), file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BuildProgress:
    """Shows a build, phase after phase; a context manager, whose end is that of the last phase."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Show nothing until a phase begins."""
        self._stream = stream
        self._current: Progress | None = None

    def start(self, phase: str, total_rows: int) -> None:
        """Begin a phase, such as `generate` or `score`, of so many rows; 0 where the number is not known yet."""
        self.finish()
        self._current = Progress(phase, total_rows or None, stream=self._stream)

    def advance(self, rows: int, tokens: int) -> None:
        """Count rows and tokens that are done."""
        if self._current is not None:
            self._current.advance(rows, tokens)

    def note(self, text: str) -> None:
        """Print a line, beside the phase where there is one."""
        if self._current is not None:
            self._current.note(text)
        else:
            print(printable(text), file=self._stream or sys.stderr, flush=True)

    def finish(self) -> None:
        """End the phase."""
        if self._current is not None:
            self._current.close()
            self._current = None

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()


def duration(seconds: float) -> str:
    """Write a duration for people.

    >>> duration(3.2), duration(75), duration(7325)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bar(phase: str, total: int | None, unit: str, done: int, stream: TextIO) -> Any:
    from tqdm import tqdm

    return tqdm(
        desc=printable(phase),
        total=total,
        unit=f" {unit}",
        initial=done,
        file=stream,
        dynamic_ncols=True,
        smoothing=0.05,
    )

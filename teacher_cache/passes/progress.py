"""How far a build is: what phase 1 tells whoever shows it.

The builder calls these from its own thread, `advance` for every row; showing it (bar, rate, time left) at a readable
pace is the display's work.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives a build's progress, one phase after the other."""

    def start(self, phase: str, total_rows: int) -> None:
        """Begin a phase (`list`, `generate`, `import` or `score`) of so many rows; 0 where the number is not known
        yet.
        """
        ...

    def advance(self, rows: int, tokens: int) -> None:
        """Count rows and tokens that are done."""
        ...

    def note(self, text: str) -> None:
        """Show a line, such as what an engine does before its first row."""
        ...

    def finish(self) -> None:
        """End the phase."""
        ...


class NoProgress:
    """Shows nothing."""

    def start(self, phase: str, total_rows: int) -> None:
        """Ignore the phase."""

    def advance(self, rows: int, tokens: int) -> None:
        """Ignore the step."""

    def note(self, text: str) -> None:
        """Ignore the line."""

    def finish(self) -> None:
        """Ignore the end."""

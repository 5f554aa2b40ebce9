"""What training tells a display: a stage begins, steps are done, a line is worth reading."""

from __future__ import annotations

from typing import Protocol


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

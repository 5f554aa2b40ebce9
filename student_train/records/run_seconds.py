"""Wall seconds of a training phase, added to the run's `seconds.json`."""

from __future__ import annotations

import time
from pathlib import Path

from shared.seconds import add_seconds, read_seconds


class SecondsLog:
    """Adds the time since it was made, or last saved, to one phase."""

    def __init__(self, output_dir: Path, phase: str) -> None:
        """Begin to measure a phase such as `train.kd`; errors as for `read_seconds`, before any work."""
        read_seconds(output_dir)
        self._output_dir = output_dir
        self._phase = phase
        self._since = time.perf_counter()

    def save(self) -> None:
        """Add the seconds since the last call."""
        now = time.perf_counter()
        add_seconds(self._output_dir, self._phase, now - self._since)
        self._since = now

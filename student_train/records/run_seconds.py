"""Seconds per phase of a run, added up over every time that it was started, in `seconds.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path

from shared.atomic import write_atomic


class SecondsLog:
    """Adds the time since it was made, or last saved, to one phase."""

    def __init__(self, output_dir: Path, phase: str) -> None:
        """Begin to measure a phase such as `train.kd`."""
        self.path = output_dir / "seconds.json"
        self.phase = phase
        self._since = time.perf_counter()

    def save(self) -> None:
        """Add the seconds since the last call."""
        now = time.perf_counter()
        seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        seconds[self.phase] = seconds.get(self.phase, 0.0) + now - self._since
        self._since = now
        write_atomic(self.path, json.dumps(seconds, indent=1).encode(), what="seconds")

"""One JSON line per optimizer step, exactly as computed, cut back to the checkpoint's step on resume.

`metrics.jsonl` holds nothing that depends on the machine's speed, so that an interrupted and resumed run writes the
same bytes as one that was never interrupted; seconds go to `timing.jsonl` beside it. A line is one write; a checkpoint
syncs the file first, so that even a power cut leaves every line up to the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.atomic import write_atomic
from shared.errors import TrainingError
from shared.text import strict_json


def _finite(value: Any) -> Any:
    """Return a value that JSON has: null for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, Mapping) else value


class StepLog:
    """An append-only JSON-lines file keyed by `step`."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file, keeping only lines up to `last_step`; a torn last line is dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for record, line in _lines(path) if record["step"] <= last_step]
        write_atomic(path, b"".join(kept), what=path.stem)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step's line."""
        self._file.write(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Make every line so far survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def flattened(schedule: Mapping[str, Any], num_tokens: int) -> dict[str, float]:
    """Return the schedule of a step under flat names: `weight/TERM`, `temperature/TERM`, `share/SOURCE` and what
    balances losses.

    >>> flattened({"weights": {"forward_kl": 0.5}, "tokens_by_source": {"math": 30, "code": 10}}, 40)
    {'weight/forward_kl': 0.5, 'share/math': 0.75, 'share/code': 0.25}
    """
    flat: dict[str, float] = {}
    for title, values in schedule.items():
        scale = 1 / max(num_tokens, 1) if title == "tokens_by_source" else 1
        name = "share" if title == "tokens_by_source" else title.removesuffix("s")
        flat |= {f"{name}/{key}": value * scale for key, value in values.items()}
    return flat


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the records of a step log, oldest first; empty where there is none.

    Raises:
        TrainingError: a line is no record of a step.
    """
    return [record for record, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = strict_json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("it has no step")
        except ValueError as error:
            raise TrainingError(
                f"{path}:{number} is no record of a step ({error}); put the file back from a copy, or remove the line"
            ) from None
        found.append((record, line))
    return found

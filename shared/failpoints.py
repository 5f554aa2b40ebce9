"""Places where a test can kill the process as `kill -9` would, to prove that nothing is lost.

`DECANT_FAILPOINT=name` (or `name@3` for the third time it is met) sends SIGKILL to the own process at that place.
Unset, a fail-point costs one dictionary look-up. Each writer calls `failpoint("<what>.before_<step>")` and
`after_<step>` around every write, fsync, rename, link and mkdir; the names that exist are those of `failpoint_names`.
Besides, an engine of many has `engine.unit_N` where it begins unit N, to prove that a unit which kills engines is set
aside.
"""

from __future__ import annotations

import os
import signal
from itertools import product

ATOMIC_STEPS = ("write", "fsync", "rename", "fsync_dir")
"""Steps of every atomically written file, in order."""

WRITTEN_FILES = ("cache_json", "tokenizer", "layer_json", "sequences", "sequences_record", "targets", "targets_record")
"""What phase 1 writes by temporary file, fsync and rename."""

_hits: dict[str, int] = {}


def failpoint_names() -> tuple[str, ...]:
    """List every fail-point of phase 1, in the order in which a build meets them."""
    atomic = (f"{what}.{when}_{step}" for what, step, when in product(WRITTEN_FILES, ATOMIC_STEPS, ("before", "after")))
    linked = (f"plan.{when}_{step}" for step in ("write", "fsync", "link", "fsync_dir") for when in ("before", "after"))
    made = (f"directory.{when}_{step}" for step in ("mkdir", "fsync_dir") for when in ("before", "after"))
    return (*made, *linked, *atomic)


def failpoint(name: str) -> None:
    """Kill the own process here when the environment names this place; otherwise do nothing."""
    wanted = os.environ.get("DECANT_FAILPOINT")
    if not wanted:
        return
    place, _, count = wanted.partition("@")
    if place != name:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] >= int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)

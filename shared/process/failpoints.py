"""Places where a test can kill the process as `kill -9` would, to prove that nothing is lost.

`DECANT_FAILPOINT=name` (or `name@3` for the third time it is met) sends SIGKILL to the own process at that place.
Unset, a fail-point costs one dictionary look-up. Each writer calls `failpoint("<what>.before_<step>")` and
`after_<step>` around every write, fsync, rename, link and mkdir; tests/failpoints.py lists those of phase 1.
Besides, an engine of many has `engine.unit_N` where it begins unit N, to prove that a unit which kills engines is set
aside.
"""

from __future__ import annotations

import os
import signal

_hits: dict[str, int] = {}


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

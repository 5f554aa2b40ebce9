"""Kill a build at a fail-point, continue it, and compare with an unbroken one; prints one JSON line per fail-point.

A process of its own, because it forks: `python -m tests.shared.kill_everywhere DIRECTORY`. Each build runs in a fork,
which costs milliseconds where a fresh interpreter costs half a second.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.garbage import collect_garbage
from tests.failpoints import failpoint_names
from tests.shared.small_cache import build, tree


def build_in_fork(path: Path, place: str | None) -> int:
    """Build in a child, with a fail-point or without; return the signal that ended it (0: none)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if place:
                os.environ["DECANT_FAILPOINT"] = place
            build(path, last=5, rows_per_part=3)
            status = 0
        except BaseException:  # noqa: BLE001 - the child must not return into the parent's loop
            traceback.print_exc()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the build failed at {place}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def places(name: str) -> tuple[str, ...]:
    """The first time a fail-point is met, and for parts the second, when one is committed already."""
    return (name, f"{name}@2") if name.startswith(("sequences.", "targets.")) else (name,)


def main(root: Path) -> None:
    """Try every fail-point."""
    whole = root / "whole"
    build(whole, last=5, rows_per_part=3)  # here, not in a fork: what is set up once is inherited by every child
    expected = tree(whole)
    for name in failpoint_names():
        for place in places(name):
            path = root / "killed"
            signal = build_in_fork(path, place)
            try:
                seen = len(Cache.open(path, allow_partial=True)) if (path / "cache.json").exists() else 0
                problems = [
                    p for p in (verify_cache(path) if (path / "cache.json").exists() else []) if "tokenizer" not in p
                ]
            except Exception as error:  # noqa: BLE001 - reported to the test
                seen, problems = -1, [repr(error)]
            again = build_in_fork(path, None)
            removed = len(collect_garbage(path, dry_run=False, min_age_seconds=-60))
            got = tree(path)
            differing = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
            result = {"place": place, "signal": signal, "again": again, "seen": seen, "problems": problems}
            print(json.dumps({**result, "differing": differing, "removed": removed}))
            shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""`python -m tools.bench.trials.remote_kill_trials --kills 30`: readers, pushes and pulls killed with SIGKILL.

A cache of small parts is trained from, pushed and pulled through an S3 server on loopback that waits 50 ms before every
request and breaks off one answer in fifty. Each begins again and again with nothing, is killed from outside after a
randomly drawn share of the time that it takes, up to three times, and is at last left to finish. After every kill, what
is there is looked at: each file under its own name must be whole, each record beside its part, cache.json after all
that it counts; what a reader keeps must fit its checksum. At the end the cache must be the same files, and metrics and
weights those of a training from the directory, byte for byte.
Cost: two or three runs of a second or two per kill, in processes forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from shared.cache.cache import Cache
from shared.cache.sync.mirror import list_remote
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.places import STORE_VARIABLE
from shared.remote.transfer import LIST_FILE, Remote
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.bench.loopback_s3 import Proxy, slow_s3
from tools.bench.trials.forked import Forked
from tools.bench.trials.train_kill_trials import outcome, recipe_of, train

STEPS = ("train", "push", "pull")
MOST_KILLS = 3
"""Of one run, one after another."""
WINDOW_PARTS = 3
BUCKET = "trials"
_ENDS = (LIST_FILE, "README.md")
"""What a push adds to a cache."""


def in_small_parts(source: Path, path: Path, rows_per_part: int = 2) -> Path:
    """Write the rows and targets of a cache into another one of many small parts, and return its path."""
    cache = Cache.open(source)
    assert cache.layer is not None
    writer = CacheWriter.create_or_open(path, cache.sequences_identity, read_tokenizer_files(source))
    layer = LayerWriter.create_or_open(writer, None, cache.layer, {})
    for start in range(0, len(cache), rows_per_part):
        rows = [cache[i] for i in range(start, min(start + rows_per_part, len(cache)))]
        stem = f"part-0123abcd-{start // rows_per_part:06d}"
        writer.write_sequences(stem, rows, {})
        layer.write(stem, [row.key for row in rows], [row.targets for row in rows if row.targets is not None], {})
    return path


def files_below(path: Path) -> dict[str, bytes]:
    """Return every file's bytes by relative name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def problems(found: Mapping[str, bytes], whole: Mapping[str, bytes]) -> list[str]:
    """List what a reader of a half pushed or pulled cache could take for what it is not.

    >>> problems({"sequences/a.json": b"1"}, {"sequences/a.json": b"1", "sequences/a.arrow": b"2"})
    ['sequences/a.json is there before its part']
    """
    seen = {name: data for name, data in found.items() if ".tmp-" not in name and name not in _ENDS}
    wrong = [f"{name} is not what it should be" for name, data in seen.items() if whole.get(name) != data]
    for name in seen:
        arrow = f"{name.removesuffix('.json')}.arrow"
        if name.endswith(".json") and arrow in whole and arrow not in seen:
            wrong.append(f"{name} is there before its part")
    if "cache.json" in seen and len(seen) < len(whole):
        wrong.append(f"cache.json is there with {len(seen)} of {len(whole)} files")
    return wrong


def kept_problems(store: Path, whole: Mapping[str, bytes]) -> list[str]:
    """List parts and records in a reader's store that are not whole."""
    parts = (store / "parts").glob("*.arrow")
    wrong = [f"{file.name} in the store" for file in parts if xxhash.xxh3_128_hexdigest(file.read_bytes()) != file.stem]
    for mirror in (store / "caches").glob("*"):
        known = {name: data for name, data in files_below(mirror).items() if name in whole}
        wrong += [f"{name} in the mirror" for name, data in known.items() if data != whole[name]]
    return wrong


def do_step(
    step: str, document: dict[str, Any], cache: Path, url: str, place: Path, environment: dict[str, str]
) -> None:
    """Train from a URL, push to it, or pull from it; what comes of it lies in `place`.

    The environment names the server: what this process is forked from may have been started beside an earlier one.
    """
    from shared.cache.sync.pull import pull_cache
    from shared.cache.sync.push import push_cache

    os.environ |= environment | {STORE_VARIABLE: str(place / "store")}
    if step == "train":
        train(document)
    elif step == "push":
        push_cache(cache, Remote(url))
    else:
        pull_cache(Remote(url), place / "pulled")


class Trials:
    """Kills and continues readers, pushes and pulls in turn."""

    def __init__(self, cache: Path, student: Path, root: Path, proxy: Proxy, seed: int) -> None:
        """Do each once without kills, to know how long it takes and what comes of it."""
        self._forked = Forked("student_train.stage.stages", "shared.cache.sync.push", "s3fs", "tenacity")
        self._root, self._proxy, self._chance = root, proxy, random.Random(seed)
        self._cache, self._student = in_small_parts(cache, root / "cache"), student
        self._whole = files_below(self._cache)
        self._number = 0
        self._forked.run(root / "log", train, self._recipe(str(self._cache), root / "unbroken"))
        self._trained = outcome(root / "unbroken")
        self._pushed = f"s3://{BUCKET}/whole"
        self._seconds = {"push": self._timed("push", self._pushed)}
        self._seconds |= {step: self._timed(step, self._pushed) for step in ("train", "pull")}

    def trial(self, step: str, kills: int) -> tuple[int, list[str]]:
        """Do a step with at most `kills` kills; return how many there were, and what was wrong after any of them."""
        url, place = self._new(step)
        done, wrong = 0, []
        for _ in range(kills):
            if not self._run(step, url, place, self._chance.uniform(0.05, 1.0) * self._seconds[step]):
                break
            done += 1
            wrong += self._judge(step, url, place, finished=False)
        self._run(step, url, place)
        wrong += self._judge(step, url, place, finished=True)
        shutil.rmtree(place)
        return done, [f"{step} {self._number}: {one}" for one in wrong]

    def _new(self, step: str) -> tuple[str, Path]:
        self._number += 1
        place = self._root / f"run-{self._number}"
        place.mkdir()
        return f"s3://{BUCKET}/{self._number}" if step == "push" else self._pushed, place

    def _timed(self, step: str, url: str) -> float:
        _, place = self._new(step)
        started = time.monotonic()
        self._run(step, url, place)
        seconds = time.monotonic() - started
        wrong = self._judge(step, url, place, finished=True)
        assert not wrong, wrong
        shutil.rmtree(place)
        return seconds

    def _judge(self, step: str, url: str, place: Path, *, finished: bool) -> list[str]:
        """List what is wrong with what a step has left."""
        if step == "train":
            same = not finished or outcome(place / "run") == self._trained
            return kept_problems(place / "store", self._whole) + ["other metrics or weights"] * (not same)
        found = files_below(place / "pulled") if step == "pull" else self._at(url)
        left = {name for name in found if name not in _ENDS and ".tmp-" not in name}  # `decant cache gc` removes those
        return problems(found, self._whole) + ["not the same files"] * (finished and left != set(self._whole))

    def _at(self, url: str) -> dict[str, bytes]:
        """Return every file of a cache at a URL, asked without delay."""
        remote, seconds = Remote(url), self._proxy.seconds
        self._proxy.seconds = 0.0
        try:
            return {name: remote.read(name) for name in list_remote(remote)}
        finally:
            self._proxy.seconds = seconds

    def _run(self, step: str, url: str, place: Path, kill_after: float | None = None) -> bool:
        """Run a step until it ends, or for so many seconds; return whether it was killed."""
        end = None if kill_after is None else time.monotonic() + kill_after
        moment = None if end is None else lambda: time.monotonic() >= end
        arguments = step, self._recipe(url, place / "run"), self._cache, url, place, dict(os.environ)
        return self._forked.run(self._root / "log", do_step, *arguments, kill_when=moment)

    def _recipe(self, cache: str, output_dir: Path) -> dict[str, Any]:
        """Return a recipe that trains from a path or a URL in one order."""
        recipe = recipe_of("all weights", Path(), self._student, output_dir)
        stages = [{**stage, "window_parts": WINDOW_PARTS} for stage in recipe["stages"]]
        return {**recipe, "cache": cache, "stages": stages}


def main(argv: list[str] | None = None) -> int:
    """Make the trials, print the table and write it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each of train, push and pull (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("data/golden/run-1/cache"))
    parser.add_argument("--student", type=Path, default=Path("data/golden/run-1/student"))
    parser.add_argument("--no-page", action="store_true", help="print only, leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    killed, runs, wrong = Counter[str](), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="decant-kills-") as root, slow_s3(BUCKET) as proxy:
        trials = Trials(options.cache, options.student.resolve(), Path(root), proxy, options.seed)
        while left := [step for step in STEPS if killed[step] < options.kills]:
            step = min(left, key=lambda name: runs[name])
            kills, found = trials.trial(step, min(MOST_KILLS, options.kills - killed[step]))
            killed[step] += kills
            runs[step] += 1
            wrong += found
            print(f"{step}: {kills} kills, {found or 'whole and equal'}", file=sys.stderr, flush=True)
        broken, requests = proxy.broken, len(proxy.requests)
    failed = Counter(one.split()[0] for one in wrong)
    rows = [[step, str(killed[step]), str(runs[step]), str(failed[step])] for step in STEPS]
    rows.append(["all", str(killed.total()), str(runs.total()), str(len(wrong))])
    text = table(["what was killed", "kills", "finished", "violations"], rows)
    text += f"\n\nOf {requests:,} requests {broken:,} were broken off."
    print(text, *wrong, sep="\n")
    if not options.no_page:
        command = f"python -m tools.bench.trials.remote_kill_trials --kills {options.kills}"
        replace_section("remote_kills", f"## Kill trials of URLs\n\n{measured_by(command)}\n\n{text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

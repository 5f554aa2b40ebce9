"""Kill builds at random moments and continue them, until the number of kills is reached; judge every cache that comes
of it.

    python -m tools.bench.trials.kill_trials --engine transformers --kills 100
    python -m tools.bench.trials.kill_trials --engine vllm --kills 10
    python -m tools.bench.trials.kill_trials --ray --kills 5          # two engines: in turn one and the whole job

One cache is built unbroken. Others are killed with SIGKILL after seeded random delays, first after the cache's first
commit, and continued by the same command; when a build finishes, the next cache begins. Every finished cache must hold
each row_key of the unbroken one exactly once, undamaged, with the same values, and every part that was committed before
a kill must be there unchanged. The teacher is the demo's. Prints a JSON summary; exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.trials.kill_runs import Build, ForkedBuild, ProgramBuild, import_everything, in_child
from tools.own_process import ROOT

POLL_SECONDS = 0.005
SECONDS_PER_BUILD = 900.0
SET_ASIDE = "units were set aside, since each killed two engines"
"""A unit that is at work at two kills of an engine; the next run does it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is built."""

    engine: str
    ray: bool
    prompts: int
    samples: int
    rows_per_part: int
    max_new_tokens: int
    tolerance_nats: float

    @property
    def num_records(self) -> int:
        """Commit records of a whole cache: of sequences and of targets."""
        return 2 * -(-self.prompts * self.samples // self.rows_per_part)

    def recipe(self, directory: Path) -> dict[str, Any]:
        """Return a recipe whose run and cache lie in `directory`."""
        teacher: dict[str, Any] = {"model": str(ROOT / "data/demo/teacher"), "engine": self.engine, "dtype": "float32"}
        teacher["max_model_len"] = 256
        if self.ray:
            teacher["workers"] = {"backend": "ray", "count": 2, "gpus_per_engine": 0}
        prompts = {
            "source": "math",
            "path": str(ROOT / "data/demo/math.train.jsonl"),
            "format": "messages",
            "limit": self.prompts,
        }
        return {
            "name": "trial",
            "output_dir": str(directory),
            "teacher": teacher,
            "prompts": [prompts],
            "generate": {"max_new_tokens": self.max_new_tokens, "temperature": 1.0, "samples_per_prompt": self.samples},
            "capture": {"mode": "top+sample", "k": 8, "draws": 2, "temperatures": [1.0, 2.0]},
            "cache": str(directory / "cache"),
            "rows_per_part": self.rows_per_part,
        }

    def start(self, directory: Path) -> Build:
        """Start or continue a build."""
        recipe = self.recipe(directory)
        return ProgramBuild(recipe) if self.ray or self.engine == "vllm" else ForkedBuild(recipe)


WORKLOADS = {
    "transformers": Workload("transformers", False, 48, 1, 4, 12, 0.0),
    "vllm": Workload("vllm", False, 450, 2, 16, 48, 2e-3),
    "ray": Workload("transformers", True, 160, 1, 4, 12, 0.0),
}


@dataclass(slots=True)
class Trials:
    """Kills so far, and what they found."""

    workload: Workload
    root: Path
    wanted: int
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    """By what was killed."""
    passes: Counter[str] = field(default_factory=Counter)
    """By the pass in which the kill came."""
    caches: int = 0
    runs: int = 0
    seconds_starting: float = 0.0
    """From the start of the unbroken build to its first commit."""
    seconds_committing: float = 0.0
    """From its first commit to its last."""
    violations: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        """Kills of any kind."""
        return sum(self.kills.values())

    def build_unbroken(self) -> None:
        """Build the cache that others are held against, and learn how long that takes."""
        started = time.monotonic()
        build = self.workload.start(self.root / "unbroken")
        first = self._wait(build, self.root / "unbroken", 1)
        self.seconds_starting = time.monotonic() - started
        last = self._wait(build, self.root / "unbroken", self.workload.num_records)
        self.seconds_committing = time.monotonic() - started - self.seconds_starting
        self._finish(build)
        if not first or not last or build.returncode() != 0:
            raise RuntimeError(f"the unbroken build ended with {build.returncode()}: {build.output()[-1000:]}")

    def run(self) -> None:
        """Kill until there were enough, each cache to its end."""
        while self.num_kills < self.wanted:
            directory = self.root / f"cache-{self.caches}"
            self._interrupt(directory)
            self.caches += 1
            shutil.rmtree(directory)

    def _interrupt(self, directory: Path) -> None:
        """Build one cache, killed as often as it takes or as kills are left, then judge it."""
        committed: dict[str, bytes] = {}
        while True:
            before = len(_records(directory))
            build = self.workload.start(directory)
            self.runs += 1
            while self.num_kills < self.wanted and self._wait_for_moment(build, directory, before):
                # Under Ray every other kill takes one engine, and the job goes on.
                what = "engine" if self.workload.ray and self.num_kills % 2 == 0 else "job"
                found = _records(directory)
                if build.kill(what):
                    self.kills[what] += 1
                    self.passes["score" if any("targets" in name for name in found) else "generate"] += 1
                    committed.update(found)
                    print(
                        f"kill {self.num_kills} of {self.wanted}: {what}, {len(found)} parts",
                        file=sys.stderr,
                        flush=True,
                    )
                before = len(_records(directory))
                if what == "job":
                    break
            self._finish(build)
            code = build.returncode()
            if code == 0:
                break
            if code != -9 and SET_ASIDE not in build.output():
                self.violations.append(f"a build that was not killed ended with {code}: {build.output()[-500:]}")
                return
        self._judge(directory, committed)

    def _wait_for_moment(self, build: Build, directory: Path, before: int) -> bool:
        """Wait until it is time to kill: at a random part of those that are left, and a random time after it was
        committed.

        Counting parts keeps the moments spread over the work whatever the machine's pace. One kill in four comes while
        the build starts, where starting is quick and something is committed. False where the build ended first or only
        its end is left.
        """
        last = self.workload.num_records - 1
        if before > last:
            return False
        started = time.monotonic()
        if isinstance(build, ForkedBuild) and before and self.rng.random() < 0.25:
            until = started + self.rng.uniform(0.0, self.seconds_starting)
        else:
            if not self._wait(build, directory, self.rng.randint(min(before + 1, last), last)):
                return False
            until = time.monotonic() + self.rng.uniform(0.0, 2.0 * self.seconds_committing / self.workload.num_records)
        while time.monotonic() < until:
            if build.returncode() is not None:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _wait(self, build: Build, directory: Path, num_records: int) -> bool:
        """Wait until so many parts of either kind are committed; False where the build ended first."""
        bound = time.monotonic() + SECONDS_PER_BUILD
        while len(_records(directory)) < num_records:
            if build.returncode() is not None:
                return False
            if time.monotonic() > bound:
                raise RuntimeError(f"nothing was committed in {SECONDS_PER_BUILD:.0f} s: {build.output()[-1000:]}")
            time.sleep(POLL_SECONDS)
        return True

    def _finish(self, build: Build) -> None:
        while build.returncode() is None:
            time.sleep(POLL_SECONDS)

    def _judge(self, directory: Path, committed: dict[str, bytes]) -> None:
        """Compare a finished cache with the unbroken one, and its parts with those seen before each kill."""
        from tools.bench.trials.cache_comparison import differences

        now = _records(directory)
        self.violations += [
            f"{name} was committed before a kill and changed" for name in committed if now.get(name) != committed[name]
        ]
        arguments = self.root / "unbroken/cache", directory / "cache", self.workload.tolerance_nats
        self.violations += in_child(lambda: differences(*arguments))


def run_trials(name: str, kills: int, seed: int, root: Path) -> dict[str, Any]:
    """Run the trials of one workload below `root` and return the summary."""
    workload = WORKLOADS[name]
    if not workload.ray and workload.engine == "transformers":
        import_everything()
    trials = Trials(workload, root, kills, random.Random(seed))
    started = time.monotonic()
    trials.build_unbroken()
    trials.run()
    return {
        "workload": name,
        "seed": seed,
        "kills": trials.num_kills,
        "kills_of": dict(trials.kills),
        "kills_in_pass": dict(trials.passes),
        "caches": trials.caches,
        "runs": trials.runs,
        "rows_per_cache": workload.prompts * workload.samples,
        "parts_per_cache": workload.num_records,
        "seconds": round(time.monotonic() - started, 1),
        "violations": trials.violations,
    }


def main() -> int:
    """Run the trials that the command line names."""
    parser = argparse.ArgumentParser(
        description="Kill builds at random moments, continue them, compare with an unbroken one."
    )
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="engine of the builds"
    )
    parser.add_argument(
        "--ray", action="store_true", help="two engines under Ray; kills an engine and the whole job in turn"
    )
    parser.add_argument("--kills", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    arguments = parser.parse_args()
    if arguments.ray and arguments.engine != "transformers":
        parser.error("--ray runs the transformers engine; leave --engine out")
    with tempfile.TemporaryDirectory(prefix="decant-trials-") as root:
        summary = run_trials("ray" if arguments.ray else arguments.engine, arguments.kills, arguments.seed, Path(root))
    print(json.dumps(summary, indent=2))
    return 1 if summary["violations"] else 0


def _records(directory: Path) -> dict[str, bytes]:
    """Return the commit records of a cache, by path."""
    found = {}
    for path in (directory / "cache").glob("*/**/part-*.json"):
        found[str(path.relative_to(directory))] = path.read_bytes()
    return found


if __name__ == "__main__":
    sys.exit(main())

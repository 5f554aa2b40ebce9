"""`python -m tools.bench.students.streaming`: training from S3 beside training from a directory, and what windows cost.

The demo's cache in parts of 16 rows lies in a directory and behind an S3 server on loopback that waits 50 ms before
every request and breaks off one answer in fifty; the local store holds a third of it, or all. The same stage is trained
from both at the same time, a core each, cores swapped from pair to pair: a machine whose speed drifts slows both. Are
the losses the same, how long is a step once warm, does memory grow, what is in the store?
Then the demo's student learns from rows in windows of several widths and from all rows together, several seeds each.
Cost: four trainings per pair, and a training and an evaluation per width and seed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path

from shared.cache.sync.push import push_cache
from shared.places import STORE_VARIABLE
from shared.recipe.file import load_recipe
from shared.remote.part_store import BOUND_VARIABLE
from shared.remote.transfer import Remote
from student_train.records.metrics_log import read_steps
from tools.bench.benchmarks_page import called, measured_by, replace_section, table
from tools.bench.loopback_s3 import slow_s3
from tools.bench.process_memory import memory_mib
from tools.bench.students.seeds import Figures, decant, interval, mean_rows, run, write_recipe
from tools.bench.trials.remote_kill_trials import in_small_parts
from tools.own_process import own_command, own_environment

BUCKET = "bench"
WINDOW_PARTS = 8
WIDTHS: dict[str, int | None] = {"1 part": 1, "8 parts": 8, "32 parts": 32, "all rows together": None}


def streaming_recipe(path: Path, cache: str, window_parts: int | None, steps: int) -> Path:
    """Write a recipe that trains the demo's student from a path or a URL, and return its path."""
    losses = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]
    trainer = {
        "learning_rate": 1e-3,
        "max_steps": steps,
        "pack_tokens": 2048,
        "save_steps": 10 * steps,
        "report_to": "none",
    }
    return write_recipe(path, cache, "data/demo/student", {"kd": losses}, window_parts=window_parts, trainer=trainer)


class Watched:
    """One training in a process of its own, looked at while it runs: its own memory, and the bytes in its store."""

    def __init__(self, recipe: Path, bound_gb: float, core: int) -> None:
        """Begin to train on one core, with a store beside the recipe."""
        self._recipe, self._store = recipe, recipe.parent / "store"
        self.mib: list[float] = []
        self.most_stored = 0
        environment = {**own_environment(), STORE_VARIABLE: str(self._store), BOUND_VARIABLE: str(bound_gb)}
        command = own_command("-m", "tools.cli", "train", str(recipe))
        self._process = subprocess.Popen(command, env=environment)  # noqa: S603 - our own interpreter
        os.sched_setaffinity(self._process.pid, {core})
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def finished(self) -> Watched:
        """Return this training once it has ended, with what it measured."""
        self._watch.join()
        if self._process.returncode:
            raise SystemExit(
                f"decant train {self._recipe} ended with exit code {self._process.returncode}; its message stands above"
            )
        trained = self._recipe.parent / "run" / "train" / "kd"
        self.losses = [line["loss"] for line in read_steps(trained / "metrics.jsonl")]
        timing = read_steps(trained / "timing.jsonl")
        warm = timing[len(timing) // 2 :]
        self.step_seconds = statistics.fmean(line["seconds"] for line in warm)
        self.waited = sum(line["waited_seconds"] for line in warm) / sum(line["seconds"] for line in warm)
        return self

    @property
    def growth(self) -> float:
        """Return the most memory in the last quarter over the most in the third."""
        quarter = len(self.mib) // 4
        return max(self.mib[-quarter:]) / max(self.mib[-2 * quarter : -quarter])

    def _look(self) -> None:
        while self._process.poll() is None:
            time.sleep(0.5)
            with suppress(OSError):  # the process has ended, or a part was renamed or removed since it was listed
                self.mib.append(memory_mib("RssAnon", self._process.pid))
                parts = (self._store / "parts").glob("*")
                self.most_stored = max(self.most_stored, sum(file.stat().st_size for file in parts))


def streamed(cache: Path, root: Path, steps: int, num_pairs: int) -> str:
    """Train from the directory and from S3 at the same time, several times, and return the table."""
    size = sum(file.stat().st_size for file in cache.rglob("*.arrow"))
    bounds = {"a third": size // 3, "all": 2 * size}
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two trainings are measured side by side, and this process has one core")
    pairs: dict[str, list[tuple[Watched, Watched]]] = {name: [] for name in bounds}
    with slow_s3(BUCKET) as proxy:
        url = f"s3://{BUCKET}/cache"
        push_cache(cache, Remote(url))
        for number, (name, bound) in product(range(num_pairs), bounds.items()):
            here, places = root / f"{name}-{number}", {"directory": str(cache), "s3": url}
            recipes = [
                streaming_recipe(here / below / "recipe.yaml", place, WINDOW_PARTS, steps)
                for below, place in places.items()
            ]
            on = cores if number % 2 else cores[::-1]
            both = [Watched(recipe, bound / 1e9, core) for recipe, core in zip(recipes, on, strict=True)]
            local, far = [one.finished() for one in both]
            pairs[name].append((local, far))
        requests, broken = len(proxy.requests), proxy.broken
    losses = {tuple(one.losses) for found in pairs.values() for pair in found for one in pair}
    rows = []
    for name, found in pairs.items():
        ratios = [far.step_seconds / local.step_seconds for local, far in found]
        fars = [far for _, far in found]
        rows.append(
            [
                name,
                f"{1000 * statistics.median(local.step_seconds for local, _ in found):.0f}",
                f"{1000 * statistics.median(far.step_seconds for far in fars):.0f}",
                f"{statistics.median(ratios):.3f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
                f"{statistics.median(far.waited for far in fars):.2%}",
                f"{max(max(far.mib) for far in fars):,.0f}",
                f"{max(far.growth for far in fars):.3f}",
                f"{max(far.most_stored for far in fars) / bounds[name]:.2f}",
            ]
        )
    header = ["store holds", "ms a step, directory", "ms a step, S3", "S3 / directory (each pair)", "of it waiting"]
    header += ["own memory, MiB", "last quarter / third", "store / its bound"]
    same = "the same bit for bit" if len(losses) == 1 else "NOT the same"
    return (
        f"{table(header, rows)}\n\nLosses of all {steps} steps are {same}. A step is the mean of the second half, "
        "medians over the pairs; both trainings, the server and the proxy share two cores. "
        f"{len(list(cache.rglob('*.arrow')))} files of {size / 1e6:.1f} MB; of {requests:,} requests {broken:,} were "
        "broken off."
    )


def windowed(cache: Path, root: Path, steps: int, seeds: list[int]) -> str:
    """Train from windows of several widths, and return the table of held-out figures."""
    runs: list[Mapping[str, Figures]] = []
    for seed in seeds:
        of_seed = {}
        for name, parts in WIDTHS.items():
            recipe = streaming_recipe(root / name.replace(" ", "-") / "recipe.yaml", str(cache), parts, steps)
            heldout = run(recipe, seed, recipe.parent)["kd"]["heldout"]
            of_seed[name] = {"KL, nats": heldout["kl_nats"], "top-1 agreement, %": 100 * heldout["top1_agreement"]}
        runs.append(of_seed)
    whole = list(WIDTHS)[-1]
    rows = mean_rows(runs, WIDTHS)
    rows += [
        [f"{name} - {whole}"]
        + [interval([one[name][column] - one[whole][column] for one in runs], "+") for column in runs[0][whole]]
        for name in list(WIDTHS)[:-1]
    ]
    return table(["windows of", *runs[0][whole]], rows)


def main(argv: list[str] | None = None) -> int:
    """Measure both, print the tables and write them into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=3, help="trainings from both (default: %(default)s)")
    parser.add_argument("--only", choices=("streamed", "windowed"), help="one of both (default: both)")
    options = parser.parse_args(argv)
    decant("teach", options.recipe)
    with tempfile.TemporaryDirectory(prefix="decant-streaming-") as directory:
        root = Path(directory)
        cache = in_small_parts(load_recipe(Path(options.recipe)).cache[0], root / "cache", rows_per_part=16)
        by = measured_by(called("tools.bench.students.streaming", argv))
        if options.only != "windowed":
            text = streamed(cache, root, options.steps, options.pairs)
            print(text, flush=True)
            replace_section("streaming", f"## Training from S3\n\n{by}\n\n{text}")
        if options.only != "streamed":
            text = windowed(cache, root, options.steps, options.seeds)
            print(text)
            by += f" {options.steps} steps, parts of 16 rows, seeds {options.seeds}; mean ± 95 % interval, by seed."
            replace_section("windows", f"## What windows cost\n\n{by}\n\n{text}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

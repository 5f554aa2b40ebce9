"""What a build costs without its model: rows per second and peak memory while stored answers and targets are replayed.

An engine that returns stored answers and targets as fast as they are asked for stands in for the model, in this one
benchmark. Each size runs in a process of its own: a build of 1,000 rows first, so that everything is loaded, then the
kernel's peak mark is reset and the measured build runs into a fresh cache. Peak memory must not grow with the number of
rows. Rows have 40 tokens of prompt and 16 to 64 positions with k = 64 entries; the tokenizer is the demo's.

Memory is the process's own (anonymous) pages, sampled every 10 ms, and the kernel's peak of everything resident, which
also counts pages of mapped files that it may drop at any time. A disk with no room for it limits the rows: 4 kB each.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.recipe.recipe import Recipe
from teacher_cache.engines.protocol import Generated, GenerateRequest, Scored, ScoreRequest
from tools.bench import synthetic_teacher
from tools.bench.process_memory import memory_mib
from tools.own_process import own_command, own_environment

SIZES = (10_000, 100_000)
WARM_ROWS = 1000
TEACHER = Path("data/demo/teacher")
VOCAB_SIZE, K = 1280, 64
LENGTHS = range(16, 65)
CHILD = "import sys; from tools.bench.replay_bench import measure; measure(int(sys.argv[1]))"


class ReplayEngine:
    """Answers and scores from a store made beforehand; stands in for a model in this benchmark."""

    tokenizer = None
    vocab_size = VOCAB_SIZE
    max_model_len = 512

    def __init__(self) -> None:
        """Make one answer and one row of targets per length."""
        rng = np.random.default_rng(0)
        self._answers = {n: [*rng.integers(20, VOCAB_SIZE, n - 1).tolist(), 2] for n in LENGTHS}
        self._targets = {}
        for n in LENGTHS:
            ids = rng.permuted(np.tile(np.arange(VOCAB_SIZE, dtype=np.int32), (n, 1)), axis=1)[:, :K].ravel()
            self._targets[n] = replace(synthetic_teacher.make_targets(n, K, n), ids=ids)

    def generate(self, requests: Iterable[GenerateRequest], settings: Any) -> Iterator[Generated]:
        """Return stored answers, of lengths that follow from the seeds."""
        for request in requests:
            yield Generated(request.tag, list(self._answers[LENGTHS[request.seed % len(LENGTHS)]]), "stop")

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Return stored targets of the rows' lengths."""
        for request in requests:
            (start, end), *_ = request.spans.tolist()
            yield Scored(request.tag, self._targets[end - start])

    def provenance(self) -> Mapping[str, Any]:
        """Say what this is."""
        return {"engine": "replay"}

    def close(self) -> None:
        """Hold nothing."""


def measure(num_rows: int) -> None:
    """Print the figures of one size, as JSON."""
    from teacher_cache import build, engines

    engines.open_engine = lambda *_, **__: ReplayEngine()
    with tempfile.TemporaryDirectory(prefix="decant-replay-") as directory:
        root = Path(directory)
        build.teach(_recipe(root / "warm", WARM_ROWS))
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        recipe = _recipe(root / "measured", num_rows)
        before, started = memory_mib("RssAnon"), time.monotonic()
        with _Peak() as peak:
            summary = build.teach(recipe)
        seconds = time.monotonic() - started
        figures = {
            "rows": summary.rows,
            "positions": summary.positions,
            "rows_per_second": summary.rows / seconds,
            "generate_rows_per_second": summary.generated.rows / summary.generated.seconds,
            "score_rows_per_second": summary.scored.rows / summary.scored.seconds,
            "score_positions_per_second": summary.scored.positions / summary.scored.seconds,
            "anonymous_mib_before": before,
            "anonymous_mib_peak": peak.mib,
            "resident_mib_peak": memory_mib("VmHWM"),
        }
    print(json.dumps(figures))


def run(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Measure every size in its own process.

    Returns:
        Per size the figures of `measure`; growth_mib and growth_share of the anonymous peak from the first size to the
        last.
    """
    result: dict[str, Any] = {}
    for size in sizes:
        child = subprocess.run(  # noqa: S603 - our own interpreter and module
            own_command("-c", CHILD, str(size)), env=own_environment(), stdout=subprocess.PIPE, text=True, check=True
        )
        result[f"rows_{size}"] = json.loads(child.stdout.strip().splitlines()[-1])
    first, last = (result[f"rows_{size}"] for size in (sizes[0], sizes[-1]))
    for kind in ("anonymous", "resident"):
        result[f"{kind}_growth_mib"] = last[f"{kind}_mib_peak"] - first[f"{kind}_mib_peak"]
    result["anonymous_growth_share"] = result["anonymous_growth_mib"] / first["anonymous_mib_peak"]
    return result


def _recipe(root: Path, num_rows: int) -> Recipe:
    root.mkdir(parents=True)
    with (root / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            file.write(json.dumps({"prompt": f"Prompt number {i}: " + "how many apples has Anna? " * 3}) + "\n")
    prompts = [{"source": "replayed", "path": str(root / "prompts.jsonl"), "format": "prompt_completion"}]
    return Recipe.model_validate(
        {
            "name": "replay",
            "output_dir": str(root / "run"),
            "cache": str(root / "cache"),
            "teacher": {"model": str(TEACHER), "engine": "transformers", "max_model_len": ReplayEngine.max_model_len},
            "prompts": prompts,
            "generate": {"max_new_tokens": max(LENGTHS)},
            "capture": {"k": K},
        }
    )


class _Peak:
    """Samples this process's anonymous memory in a thread."""

    def __init__(self) -> None:
        self.mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self.mib = max(self.mib, memory_mib("RssAnon"))


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

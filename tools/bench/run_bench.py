"""`make bench`: each benchmark in a process of its own, one line of progress each, one JSON for programs.

A process each, because peak memory is a property of a process and because a warm allocator of one benchmark must not
help the next. Figures of one run are comparable with each other; the ratios are what docs/benchmarks.md quotes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from shared.atomic import write_atomic
from shared.errors import EvaluationError
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.own_process import own_command, own_environment

BENCHES = {
    "codec": ("tools.bench.codec_bench", 900),
    "reader": ("tools.bench.reader_bench", 600),
    "capture": ("tools.bench.capture_bench", 900),
    "teach": ("tools.bench.teach_bench", 1200),
    "replay": ("tools.bench.replay_bench", 1800),
    "operator": ("tools.bench.operator_bench", 1800),
}
"""Section of bench.json -> module with `run() -> dict`, and the most seconds that it may take."""

CHILD = "import importlib, json, sys; print(json.dumps(importlib.import_module(sys.argv[1]).run()))"


def measure(module: str, timeout_seconds: int) -> dict[str, object]:
    """Run one benchmark module in a child process and return its figures.

    Raises:
        EvaluationError: the child failed or ran past its bound.
    """
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter and module
            own_command("-c", CHILD, module),
            env=own_environment(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EvaluationError(
            f"{module} did not finish within {timeout_seconds} s; run it alone on an idle machine"
        ) from None
    if child.returncode:
        raise EvaluationError(f"{module} failed with exit code {child.returncode}; its message stands above")
    figures: dict[str, object] = json.loads(child.stdout.strip().splitlines()[-1])
    return figures


def with_headlines(section: str, figures: dict[str, object]) -> dict[str, object]:
    """Put the figures of the default settings on top of a section: the codec's chosen step, the
    capture's array path.
    """
    nested: dict[str, dict[str, dict[str, object]]] = figures  # type: ignore[assignment]
    if section == "codec":
        return {**nested["synthetic"]["step_1/16"], **figures}
    return {**nested["arrays"], **figures} if section == "capture" else figures


def flatten(figures: dict[str, object], prefix: str = "") -> list[list[str]]:
    """Turn nested figures into rows of (dotted name, value)."""
    rows: list[list[str]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append(
                [
                    f"{prefix}{name}",
                    f"{value:,.4g}"
                    if isinstance(value, float) and value < 1000
                    else f"{value:,.0f}"
                    if isinstance(value, float | int) and not isinstance(value, bool)
                    else str(value),
                ]
            )
    return rows


def main() -> int:
    """Run every benchmark, print its figures, write runs/bench/bench.json and docs/benchmarks.md."""
    results: dict[str, dict[str, object]] = {}
    for section, (module, timeout_seconds) in BENCHES.items():
        print(f"bench: {section} ...", flush=True)
        results[section] = with_headlines(section, measure(module, timeout_seconds))
        for name, value in flatten(results[section]):
            print(f"  {section}.{name:58s} {value}", flush=True)
    out = Path("runs/bench/bench.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(results, indent=2) + "\n").encode(), "bench")
    rows = [[f"{section}.{name}", value] for section, figures in results.items() for name, value in flatten(figures)]
    replace_section("bench", f"{measured_by('make bench')}\n\n{table(['figure', 'value'], rows)}")
    print(f"bench: wrote {out} and docs/benchmarks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

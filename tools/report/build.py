"""Build the report of one run, or of several side by side: report.json, report.md, models.csv and report.html.

Reads run directories and the caches' records only; nothing is computed again. Several runs are compared in
a directory of their own. Cost: a few seconds, nearly all of it matplotlib.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.atomic import write_atomic
from shared.cache.layout import refuse_within_cache
from shared.errors import NamingError
from shared.places import resolved
from shared.seconds import add_seconds
from tools.report.figures import report_figures
from tools.report.page import page, plot_figures
from tools.report.run_files import read_run
from tools.report.samples import choose_samples, side_samples
from tools.report.tables import markdown, models_csv

REPORT_FILES = ("report.html", "report.md", "models.csv", "report.json")


def build_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> dict[str, Any]:
    """Write the report into `output` (of one run: into it) and return what report.json says, with `files` named.

    Raises:
        EvaluationError: a directory is no run, none was given, or several without an `output`.
        UsageError: the output lies in a cache.
    """
    if not run_dirs:
        raise NamingError("no run to report on; name the output_dir of a recipe that was run")
    if len(run_dirs) > 1 and output is None:
        raise NamingError(
            f"{len(run_dirs)} runs are compared outside of them, so that each keeps its own report; name a directory "
            "with --output DIR"
        )
    if len({resolved(directory) for directory in run_dirs}) < len(run_dirs):
        raise NamingError("a run is named twice, and does not differ from itself; name each run once")
    place = Path(output) if output is not None else Path(run_dirs[0])
    if len(run_dirs) > 1 and resolved(place) in map(resolved, run_dirs):
        raise NamingError(f"{place}: this is one of the runs that are compared; name another directory")
    if place.exists() and not place.is_dir():
        raise NamingError(f"{place}: there is a file of that name; name a directory to write the report into")
    if output is not None:
        refuse_within_cache(place / "report.html")
    started = time.monotonic()
    runs = [read_run(Path(directory)) for directory in run_dirs]
    report: dict[str, Any] = _plain(report_figures(runs))
    report["files"] = [str(place / name) for name in REPORT_FILES]
    samples = choose_samples(runs[0]) + side_samples(runs[0])
    plots = plot_figures(report, runs)
    if report["seconds"] and "report" not in report["seconds"] and output is None:
        # Measured once, so that the same run always gives the same report.
        report["seconds"]["report"] = round(time.monotonic() - started, 3)
        add_seconds(runs[0].directory, "report", report["seconds"]["report"])
    texts = {
        "report.html": page(report, runs, samples, plots),
        "report.md": markdown(report),
        "models.csv": models_csv(report),
        "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
    }
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(place / name, text.encode("utf-8", errors="replace"), "report")
    return report


def _plain(value: Any) -> Any:
    """Return plain JSON values: tuples as lists, a number that is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

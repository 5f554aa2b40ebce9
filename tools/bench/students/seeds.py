"""One recipe from several seeds: trained, evaluated, and each figure as its mean with a 95 % interval.

Whatever is finished is used again, so that a bench may be cut short and continued, or extended by seeds.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError
from tools.own_process import own_command, own_environment

STUDENT_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t by number of seeds; more than ten take that of ten, a little too wide."""
Figures = dict[str, float]
"""Column -> value of one model and seed."""


def interval(values: Sequence[float], sign: str = "") -> str:
    """Format mean and half-width of the 95 % interval; `sign` "+" for differences: [1.0, 2.0, 3.0] -> '2 ± 2.5'."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.4g}"
    half = STUDENT_T_975[min(len(values), 10)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.4g} ± {half:.2g}"


def mean_rows(runs: Sequence[Mapping[str, Figures]], names: Iterable[str]) -> list[list[str]]:
    """Return a row of each model of those names: its name, then the interval of each figure over the runs."""
    return [[name, *(interval([run[name][column] for run in runs]) for column in runs[0][name])] for name in names]


def percents(model: Mapping[str, Any]) -> Figures:
    """Return the task scores of a model of a report, in percent."""
    return {name: 100 * task["score"] for name, task in model["tasks"].items()}


def run_module(module: str, *arguments: str) -> None:
    """Run a module of the program; a failure ends the benchmark."""
    command = own_command("-m", module, *arguments)
    done = subprocess.run(command, env=own_environment(), check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise EvaluationError(
            f"{module} {' '.join(arguments)} ended with exit code {done.returncode}; its message stands above"
        )


def decant(*arguments: str) -> None:
    """Run the program's command line; a failure ends the benchmark."""
    run_module("tools.cli", *arguments)


def write_recipe(
    path: Path,
    cache: str | Path,
    student: str | Path,
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Sequence[Mapping[str, Any]] = (),
    **of_all: Any,
) -> Path:
    """Write a recipe that trains a student from a cache, and return its path.

    Args:
        path: of the recipe; its directory names it, and the run is beside it.
        cache: a path or a URL.
        student: its directory.
        stages: name -> losses; each is evaluated.
        tasks: what the students are asked.
        of_all: what every stage says, such as its `trainer`.
    """
    document = {
        "name": path.parent.name.replace(" ", "-"),
        "output_dir": str(path.parent / "run"),
        "cache": str(cache),
        "heldout": {"fraction": 0.05},
        "student": {"model": str(student)},
        "stages": [{"name": name, "losses": losses, **of_all} for name, losses in stages.items()],
        "evaluate": {"models": list(stages), "engine": "transformers", "tasks": list(tasks)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def run(recipe: str | Path, seed: int, root: Path, *sets: str, stages: Iterable[str] = ()) -> dict[str, Any]:
    """Train and evaluate a recipe with one seed below `root`; return the models of its report by name.

    Args:
        recipe: its file.
        seed: also names the directory of the run, `root/seedN`.
        root: of all seeds.
        sets: further overrides.
        stages: those to train, one after another; none: all.
    """
    out = root / f"seed{seed}"
    words = [word for one in (f"seed={seed}", f"output_dir={out}", *sets) for word in ("--set", one)]
    spans = [["--from-stage", name, "--to-stage", name] for name in stages]
    for span in spans or [[]]:
        decant("train", str(recipe), *words, *span)
    decant("eval", str(recipe), *words)
    decant("report", str(out))
    models: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))["models"]
    return models

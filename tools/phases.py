"""The phases of a run as the command line calls them: each returns what programs read and what people read.

Heavy modules are imported by the phase that needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.errors import EvaluationError, UsageError
from shared.recipe import Recipe
from shared.recipe_base import closest, quoted
from tools.progress import BuildProgress, Progress

Result = tuple[Any, str]
"""What --json prints, and what people see."""


def teach(recipe: Recipe, partition: tuple[int, int] | None, max_set_aside: float | None = None) -> Result:
    """Run phase 1 and summarise it.

    Raises:
        DecantError: the build cannot start, cannot go on, or set too much aside.
    """
    from teacher_cache.build import SetAsideError
    from teacher_cache.build import teach as build

    progress = BuildProgress()
    settings: dict[str, Any] = {} if max_set_aside is None else {"max_set_aside": max_set_aside}
    try:
        summary = build(recipe, partition, progress, **settings)
    except SetAsideError as error:
        progress.finish()
        print("\n".join(error.summary.lines()))
        raise
    finally:
        progress.finish()
    return {**asdict(summary), "seconds": summary.seconds, "computed": summary.computed}, "\n".join(summary.lines())


def train(recipe: Recipe, from_stage: str | None, to_stage: str | None) -> Result:
    """Run phase 2 and name its models.

    Raises:
        UsageError: a stage is not in the recipe.
        DecantError: training cannot start or must stop.
    """
    names = [stage.name for stage in recipe.stages]
    for option, name in (("--from-stage", from_stage), ("--to-stage", to_stage)):
        if name is not None and name not in names:
            raise UsageError(f"{option} {name}: the recipe has the stages {quoted(names) or 'none'}{closest(name, names)}")
    from student_train.stages import run_stages

    directories = [Path(path) for path in run_stages(recipe, from_stage, to_stage, open_progress=Progress)]
    trained = {directory.parent.name: str(directory) for directory in directories}
    return {"models": trained}, "\n".join(f"{name}: {directory}" for name, directory in trained.items())


def evaluate(recipe: Recipe, allow_unsafe_code: bool) -> Result:
    """Evaluate every model of the recipe.

    Raises:
        EvaluationError: a model or a task cannot be evaluated.
    """
    from tools.evaluate.side_by_side import evaluate_all

    results = evaluate_all(recipe, allow_unsafe_code)
    return results, table_text(results)


def report(runs: Sequence[Path]) -> Result:
    """Build the report of one run or several.

    Raises:
        EvaluationError: a run has nothing to report.
    """
    from tools.report.build import build_report

    for run in runs:
        if not run.is_dir():
            raise EvaluationError(f"{run}: no such directory; name the output_dir of a run")
    result = build_report(list(runs))
    return result, table_text(result.get("models", {}))


def table_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the models' figures as a plain table: a score per domain in percent, then the distance to the teacher."""
    domains = list(dict.fromkeys(domain for figures in models.values() for domain in figures.get("tasks") or {}))
    header = ["model", *(f"{domain} %" for domain in domains), "held-out KL (nats)", "top-1 agreement %", "perplexity"]
    rows = [header]
    for name, figures in models.items():
        tasks, heldout = figures.get("tasks") or {}, figures.get("heldout") or {}
        row = [name, *(_percent(tasks.get(domain, {}).get("score")) for domain in domains)]
        row += [_number(heldout.get("kl_nats"), 4), _percent(heldout.get("top1_agreement")), _number(heldout.get("perplexity"), 3)]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

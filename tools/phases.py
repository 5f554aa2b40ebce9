"""The phases of a run as the command line calls them: each returns what programs read and what people read.

Heavy modules are imported by the phase that needs them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cache.rows_left_out import answers_line
from shared.cache.sync.push import pushed_as_committed
from shared.errors import UsageError
from shared.progress import BuildProgress
from shared.recipe.recipe import Recipe
from shared.text.printable import printable, say
from tools.own_phase import save_recipe
from tools.rounds.chain import rounds_in_processes, stage_of, stages_with_rounds, train_in_processes

Result = tuple[Any, str]
"""What --json prints, and what people see."""


def teach(
    recipe: Recipe, partition: tuple[int, int] | None, max_set_aside: float | None = None, layer: str | None = None
) -> Result:
    """Run phase 1 and summarise it; of several teachers, `layer` names one to run alone.

    Raises:
        DecantError: the build cannot start, cannot go on, or set too much aside.
    """
    from teacher_cache.build import SetAsideError
    from teacher_cache.several_teachers import OWN, teach_each

    other = answers_line(recipe)
    if other:
        say(f"teach: {other}")
    settings: dict[str, Any] = {} if max_set_aside is None else {"max_set_aside": max_set_aside}
    try:
        with BuildProgress() as progress, pushed_as_committed(recipe.cache[0], progress.note):
            found = teach_each(
                recipe,
                layer,
                begin=lambda name: progress.note(f"teacher {name}"),
                partition=partition,
                progress=progress,
                **settings,
            )
    except SetAsideError as error:
        print(printable("\n".join(error.summary.lines())))
        raise
    figures = {name: _build_figures(summary) for name, summary in found.items()}
    lines = [f"{name}: {line}" if recipe.teachers else line for name, one in found.items() for line in one.lines()]
    first = figures.pop(OWN, {})
    return first | ({"teachers": figures} if figures else {}), "\n".join(lines)


def _build_figures(summary: Any) -> dict[str, Any]:
    derived = ("seconds", "seconds_writing", "seconds_waiting", "computed")
    return {**asdict(summary), **{name: getattr(summary, name) for name in derived}}


def plan_calibrated(recipe: Recipe, num_rows: int, price_per_hour: float | None) -> Result:
    """Plan a recipe with rates that a short real build measures.

    Raises:
        UsageError: there is nothing to sample, or nothing left to do.
        DecantError: whatever stops a build.
    """
    from teacher_cache.calibration import calibrate
    from tools.plan.plan_calibrated import calibrated_figures, calibrated_text
    from tools.plan.planner import plan, plan_text

    planned = plan(recipe)
    if not planned.get("rows_to_do") and "rescore" not in planned:
        raise UsageError(
            "--calibrate has nothing to measure: every row of the recipe is in the cache, answered and scored"
        )
    with BuildProgress() as progress:
        found = calibrate(recipe, num_rows, progress)
    figures = calibrated_figures(recipe, planned, found, price_per_hour)
    planned["assumptions"] = [text for text in planned["assumptions"] if not _is_measured(text)]
    return {**planned, "calibrated": figures}, f"{plan_text(planned)}\n{calibrated_text(figures)}"


def _is_measured(assumption: str) -> bool:
    """Tell whether a calibration replaces an assumption of the plan."""
    return assumption.startswith("hours are not given") or "bytes per position" in assumption


def train(recipe: Recipe, from_stage: str | None, to_stage: str | None, again: Sequence[str] | None = None) -> Result:
    """Run phase 2 from a stage to a stage and name its models; steps of rounds are processes of their own.

    `again` are words of a command line that name this recipe for other processes; None: they read a copy of it.

    Raises:
        UsageError: a stage is not in the recipe.
        DecantError: training cannot start or must stop.
    """
    chosen = recipe.stages_between(from_stage, to_stage)
    from student_train.fit.allocator import expand_segments

    if not stages_with_rounds(recipe):  # whose processes are not all for training
        expand_segments()
    from student_train.stage.stages import run_stages

    if any(stage.rounds is not None for stage in chosen):
        from student_train.records.processes import num_processes

        if num_processes() > 1:
            raise UsageError(
                "the rounds of a stage start processes of their own, which torchrun cannot share out; run `decant "
                "rounds RECIPE --only train --round N` under torchrun, and the other steps without"
            )
        train_in_processes(recipe, chosen, again or [str(save_recipe(recipe))], sys.stderr.fileno())
        directories = [recipe.stage_dir(stage.name) / "model" for stage in chosen]
    else:
        directories = [Path(path) for path in run_stages(recipe, from_stage, to_stage)]
    trained = {directory.parent.name: str(directory) for directory in directories}
    return {"models": trained}, "\n".join(f"{name}: {directory}" for name, directory in trained.items())


def rounds(
    recipe: Recipe, stage_name: str | None, step: str | None, number: int | None, again: Sequence[str]
) -> Result:
    """Run one step of one round here, one round, or all of a stage's rounds, in processes of their own.

    Raises:
        UsageError: there is no such stage or round.
        DecantError: a step cannot start or must stop.
    """
    from tools.rounds import steps
    from tools.rounds.one_round import Round

    stage = stage_of(recipe, stage_name)
    assert stage.rounds is not None
    if number is not None and number > stage.rounds.count:
        raise UsageError(f"--round {number}: stage '{stage.name}' has {stage.rounds.count} rounds")
    if step is not None:
        if number is None:
            raise UsageError(f"--only {step} is a step of one round; say which with --round")
        work = {"answer": steps.answer, "score": steps.score, "train": steps.train}[step]
        return work(Round(recipe, stage, number))
    numbers = range(1, stage.rounds.count + 1) if number is None else (number,)
    rounds_in_processes(recipe, stage, numbers, again, sys.stderr.fileno())
    model = recipe.stage_dir(stage.name) / "model"
    return {"models": {stage.name: str(model)}}, f"{stage.name}: {model}"


def evaluate(recipe: Recipe, allow_unsafe_code: bool, lm_eval: str | None = None) -> Result:
    """Evaluate every model of the recipe, with tasks of lm-evaluation-harness if asked.

    Raises:
        EvaluationError: a model or a task cannot be evaluated.
    """
    from tools.evaluate.all_models import evaluate_all
    from tools.evaluate.lm_eval.lm_eval_tasks import parse_tasks, refuse_unknown, require_lm_eval, run_lm_eval
    from tools.report.figures import report_figures
    from tools.report.run_files import read_run
    from tools.report.tables import table_text

    tasks = None
    if lm_eval is not None:  # refused before any model runs
        require_lm_eval()
        tasks = parse_tasks(lm_eval)
        refuse_unknown(tasks)
    results = evaluate_all(recipe, allow_unsafe_code)
    if tasks is not None:
        for name, figures in run_lm_eval(recipe, tasks, say).items():
            results[name] = {**results[name], "lm_eval": figures}
    return results, table_text(report_figures([read_run(recipe.output_dir)]))


def report(runs: Sequence[Path], output: Path | None = None) -> Result:
    """Build the report of one run or several.

    Raises:
        EvaluationError: a run has nothing to report.
    """
    from tools.report.build import build_report
    from tools.report.tables import table_text

    result = build_report(list(runs), output)
    page, *others = result["files"]
    wrote = f"wrote {page}, {', '.join(Path(file).name for file in others)}"
    trained = f"; next: decant export {shlex.quote(str(runs[0]))}" if len(runs) == 1 and result["stages"] else ""
    return result, f"{table_text(result)}\n{wrote}{trained}"

"""report.json: every figure of the report, from what a run left on disk. Nothing is drawn or formatted here.

Layout: name, runs, models.NAME.{tasks.DOMAIN.{score, low, high, ...}, mean_score, gap_closed, heldout, answers,
    seconds,
side_by_side.TEMPERATURE.{same_as_teacher, length_kept, ...}, cost, lm_eval}, cache.{rows, positions,
bytes_per_position, mean_support, ...}, questions.DOMAIN.{questions, trained_on, heldout},
audit, seconds.PHASE, stages.NAME, train.STAGE.{steps, weights, temperatures, shares, heldout_kl_nats, answers,
evaluations} (series of [step, value] by name, thinned; of answers: [round, value]), layers, missing. With several runs,
models and stages of the second and later ones are called RUN/NAME, and a model that several runs share (teacher, base)
with equal figures appears once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluate.side_by_side.side_figures import side_by_side_figures
from tools.report.differences import Measured, differences
from tools.report.run_files import RunFiles, StageFiles
from tools.report.views.schedule_view import schedule_series

REPORT_FORMAT = 1


def report_figures(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the report of one or several runs as plain JSON values."""
    models: dict[str, Any] = {}
    measured: dict[str, Measured] = {}
    stages: dict[str, Any] = {}
    train: dict[str, Any] = {}
    for index, run in enumerate(runs):
        prefix = f"{run.name}/" if index else ""
        side_by_side = side_by_side_figures(run.side_answers)
        for name, evaluation in run.evaluations.items():
            figures = _model(run, name, evaluation)
            figures |= {
                "side_by_side": side_by_side.get(name, {}),
                "cost": run.cost.get(name),
                "lm_eval": run.lm_eval.get(name, {}),
            }
            if not (
                prefix
                and name in models
                and models[name]["tasks"] == figures["tasks"]
                and models[name]["heldout"] == figures["heldout"]
            ):
                free = _free(prefix + name, models)
                models[free] = figures
                measured[free] = Measured(
                    str(index), name, run.role_of(name), evaluation["heldout"], run.answers.get(name, ())
                )
        for name, stage in run.stages.items():
            free = _free(prefix + name, stages)
            stages[free] = _stage(stage)
            train[free] = _course(stage)
    _add_gaps(models)
    first = runs[0]
    return {
        "format": REPORT_FORMAT,
        "name": " and ".join(dict.fromkeys(run.name for run in runs)),
        "runs": [str(run.directory) for run in runs],
        "models": models,
        "differences": differences(measured),
        "cache": first.cache,
        "questions": first.questions,
        "audit": first.audit,
        "distances": first.distances,
        "seconds": first.seconds,
        "stages": stages,
        "train": train,
        "layers": first.layers,
        "identities": {name: evaluation.get("identity", {}) for name, evaluation in first.evaluations.items()},
        "missing": [
            sentence if len(runs) == 1 else f"{run.name}: {sentence}" for run in runs for sentence in run.missing
        ],
    }


def _model(run: RunFiles, name: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    tasks, heldout = evaluation["tasks"], evaluation["heldout"]
    return {
        "role": run.role_of(name),
        "tasks": tasks,
        "mean_score": math.fsum(task["score"] for task in tasks.values()) / len(tasks) if tasks else None,
        "heldout": heldout and {key: value for key, value in heldout.items() if key != "row_kl"},
        "heldout_basis": _basis(evaluation),
        "answers": _answers(run, name),
        "seconds": evaluation.get("seconds", {}),
        "made": evaluation.get("made") or {},
        "engine": (evaluation.get("identity") or {}).get("engine"),
    }


def _basis(evaluation: Mapping[str, Any]) -> str | None:
    """Say against which layer and on which rows a held-out KL was measured; KLs of different ones do not compare."""
    heldout = evaluation["heldout"]
    if heldout is None:
        return None
    asked = (evaluation.get("identity") or {}).get("heldout")
    asked = asked if isinstance(asked, dict) else {}
    named = asked.get("caches")
    caches = named if isinstance(named, list) else []
    layer = heldout.get("layer") or asked.get("targets") or "the only layer"
    rows = "rows not counted" if heldout.get("rows") is None else f"{heldout['rows']} rows"
    share = f", fraction {asked['fraction']}" if "fraction" in asked else ""
    return f"{layer} of {' and '.join(str(cache)[:8] for cache in caches) or 'the cache'}, {rows}{share}"


def _answers(run: RunFiles, name: str) -> dict[str, Any]:
    """Return lengths of a model's answers, how many were cut, and how many equal the untrained student's."""
    own = run.answers.get(name)
    if not own:
        return {}
    figures: dict[str, Any] = {
        "count": len(own),
        "mean_tokens": sum(row.get("tokens") or 0 for row in own) / len(own),
        "truncated": sum(bool(row.get("truncated")) for row in own) / len(own),
    }
    for other in ("base", "teacher"):
        theirs = run.answers.get(other, [])
        if other != name and len(theirs) == len(own):
            same = sum(mine["answer"] == row["answer"] for mine, row in zip(own, theirs, strict=True))
            figures[f"same_as_{other}"] = same / len(own)
    return figures


def _add_gaps(models: dict[str, Any]) -> None:
    """Say how much of the way from the untrained student to the teacher each model went, where both are there."""
    base, teacher = (models.get(name, {}).get("mean_score") for name in ("base", "teacher"))
    for figures in models.values():
        mean = figures["mean_score"]
        known = mean is not None and base is not None and teacher is not None and teacher - base > 1e-9
        figures["gap_closed"] = (mean - base) / (teacher - base) if known else None


def _stage(stage: StageFiles) -> dict[str, Any]:
    losses = [row["loss"] for row in stage.steps if row.get("loss") is not None]
    return {
        "steps": stage.steps[-1]["step"],
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "health": stage.health,
        "tokens_per_second": stage.tokens_per_second,
    }


def _course(stage: StageFiles) -> dict[str, Any]:
    """Return what moved over a stage's steps."""
    series = schedule_series(stage.steps, stage.evaluations, (stage.health or {}).get("rounds", ()))
    return {"steps": stage.steps[-1]["step"], **series, "evaluations": stage.evaluations}


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return the name, or with a number where it is taken."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate

"""report.html: one file, no network; the figures first, then plots, answers side by side, and what it all rests on.

Everything that comes from a file is escaped; the page's own policy forbids every fetch and every script but the one of
`answer_filter`, so that even a mistake there could not run a model's answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.report import tables
from tools.report.answer_filter import SCRIPT, script_source
from tools.report.escaped import escape, name_of
from tools.report.more_tables import more_tables
from tools.report.numbers import NONE, Table, kl_interval, kl_spread, number, percent
from tools.report.run_files import RunFiles
from tools.report.samples import Sample
from tools.report.style import CSS
from tools.report.views import confidence_plots, plots
from tools.report.views.answers_view import answers_section
from tools.report.views.largest_divergences_view import largest_divergences_section
from tools.report.views.schedule_view import schedule_plots, schedule_series

POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {script_source()}; "
    "base-uri 'none'; form-action 'none'"
)

MOST_BESIDE = 3
"""Other students that the first sentence names; of more it names the best."""

_COLUMNS = (
    "small print: 95 % interval",
    "held-out KL: nats per position from the teacher's cached distributions, on prompts never trained on",
    "top-1: positions whose most probable token is the teacher's",
    "marked: the best of base and the students, where its interval overlaps no other's",
)
"""What the legend of the models' table says beside the tasks' metrics."""


def page(
    report: Mapping[str, Any], runs: Sequence[RunFiles], samples: Sequence[Sample], figures: Sequence[tuple[str, str]]
) -> str:
    """Return the whole page; `figures` are titles and SVG elements of `plot_figures`."""
    name = escape(str(report["name"]))
    body = [f"<h1>{name}</h1>", _lead(report), _missing(report), _models(report), _facts(report), _plots(figures)]
    body += [
        _heldout_table(report),
        largest_divergences_section(report["models"]),
        *(_table(table) for table in more_tables(report)),
        _answers_table(report),
        answers_section(samples, list(report["models"])),
        _stages(report),
        _basis(report, runs),
    ]
    title = f"{name} – Decant report"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n'
        + "\n".join(filter(None, body))
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _lead(report: Mapping[str, Any]) -> str:
    """Say what the last stage reached, beside base, teacher and a few students: the scores' mean, then held-out KL."""
    models = report["models"]
    students = [name for name, model in models.items() if model["role"] == "student"]
    if not students:
        return '<p class="lead soft">Decant report</p>'
    last, others = students[-1], students[-2::-1]
    lines = []
    if models[last]["mean_score"] is not None:
        gap = models[last]["gap_closed"]
        tail = "" if gap is None else f": {percent(gap, 0)} of the way from base to teacher"
        scores = {name: model["mean_score"] for name, model in models.items()}
        says = "scores, in the mean of the tasks," if len(tables.score_domains(report)) > 1 else "scores"
        lines.append(_against(last, says, scores, others, percent, max) + tail)
    if models[last]["heldout"] and not tables.heldout_bases(report):
        kls = {name: (model["heldout"] or {}).get("kl_nats") for name, model in models.items()}
        says = "is, in held-out KL from the teacher, at"
        lines.append(_against(last, says, kls, others, "{:,.4f} nats".format, min))
    return "".join(f'<p class="lead">{_unbroken(line)}.</p>' for line in lines)


def _against(
    name: str,
    says: str,
    values: Mapping[str, Any],
    others: Sequence[str],
    write: Callable[[Any], str],
    best_of: Callable[..., str],
) -> str:
    """Write a model's figure beside those of base, teacher and the other students, of many the best alone."""
    known = [other for other in others if values.get(other) is not None]
    if len(known) > MOST_BESIDE:
        best = best_of(known, key=lambda other: values[other])
        beside = [f"the best of {len(known)} other students, {escape(best)}, {write(values[best])}"]
    else:
        beside = [f"{escape(other)} {write(values[other])}" for other in known]
    ends = [other for other in ("base", "teacher") if values.get(other) is not None]
    beside += [f"{escape(other)} {write(values[other])}" for other in ends]
    tail = f", against {', '.join(beside)}" if beside else ""
    return f"<b>{escape(name)}</b> {says} {write(values[name])}{tail}"


def _unbroken(text: str) -> str:
    """Keep a number and its unit on one line, in escaped text."""
    return re.sub(r"(?<![\w.])[\d.,]+ (?:%|nats)", r'<span class="n">\g<0></span>', text)


def _missing(report: Mapping[str, Any]) -> str:
    if not report["missing"]:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in report["missing"])
    return f'<div class="note"><b>Not complete</b><ul>{items}</ul></div>'


def _models(report: Mapping[str, Any]) -> str:
    models, header = report["models"], tables.model_header(report)
    if not models:
        return '<p class="card">No model was evaluated yet.</p>'
    rows, best = tables.model_rows(report), _best_cells(report)
    head = "".join(f"<th>{name_of(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        colour = plots.colour_of(list(models), row[0])
        cells = f'<th scope="row"><i class="dot" style="background:{colour}"></i>{name_of(row[0])}</th>'
        for column, cell in enumerate(row[1:], start=1):
            spread = _spread(models[row[0]], header[column])
            mark = ' class="best"' if (row[0], column) in best else ""
            label = escape(header[column])
            cells += f'<td{mark} data-label="{label}">{escape(cell)}{f"<small>{spread}</small>" if spread else ""}</td>'
        body += f"<tr>{cells}</tr>"
    legend = escape(tables.models_legend(report, *_COLUMNS))
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    table = f'<div class="card"><div class="scroll"><table class="stack">{inside}</table></div>'
    return f'{table}<p class="legend">{legend}</p></div>'


def _best_cells(report: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return (model, column) of each best figure among all models but teachers, where its 95 % interval overlaps no
    other's; a figure without an interval is never called the best.
    """
    found = set()
    for column, title in enumerate(tables.model_header(report)):
        if title == "held-out KL" and tables.heldout_bases(report):
            continue
        intervals = {
            name: interval
            for name, model in report["models"].items()
            if model["role"] != "teacher" and (interval := _interval(model, title)) is not None
        }
        if len(intervals) < 2:
            continue
        sign = -1 if title == "held-out KL" else 1
        best = max(intervals, key=lambda name: sign * sum(intervals[name]))
        low, high = intervals[best]
        if all(name == best or other[1] < low or other[0] > high for name, other in intervals.items()):
            found.add((best, column))
    return found


def _interval(model: Mapping[str, Any], title: str) -> tuple[float, float] | None:
    if title == "held-out KL":
        return kl_interval(model["heldout"] or {})
    task = model["tasks"].get(title)
    return (task["low"], task["high"]) if task else None


def _spread(model: Mapping[str, Any], title: str) -> str:
    heldout = model["heldout"] or {}
    if title == "held-out KL" and heldout:
        return kl_spread(heldout) or ("one row" if heldout.get("rows") == 1 else "")
    task = model["tasks"].get(title)
    return f"{100 * task['low']:.0f}–{100 * task['high']:.0f}" if task else ""


def _facts(report: Mapping[str, Any]) -> str:
    rows = tables.run_rows(report)
    boxes = "".join(
        f"<div><span>{escape(what)}</span><b>{_unbroken(escape(figure))}</b></div>" for what, figure in rows
    )
    return f'<div class="facts">{boxes}</div>' if rows else ""


def plot_figures(report: Mapping[str, Any], runs: Sequence[RunFiles]) -> list[tuple[str, str]]:
    """Draw every plot that the run has figures for; return titles and SVG elements."""
    models, cache = report["models"], report["cache"]
    figures: list[tuple[str, str]] = []
    counts = f" (small figures: positions, of {list(models)[-1]})" if models else ""
    if domains := tables.score_domains(report):
        figures.append(("Scores per domain, with 95 % intervals", plots.score_plot(models, domains)))
    if any(model["heldout"] for model in models.values()):
        figures.append(("Distance from the teacher on held-out prompts", plots.divergence_plot(models)))
    if confidence_plots.has_bins(models, "agreement_by_teacher_confidence"):
        title = f"Agreement with the teacher, by how sure the teacher is{counts}"
        figures.append((title, confidence_plots.agreement_plot(models)))
    if confidence_plots.has_bins(models, "calibration"):
        figures.append((f"Calibration on held-out prompts{counts}", confidence_plots.calibration_plot(models)))
    for index, run in enumerate(runs):
        for name, stage in run.stages.items():
            label = f"{run.name}/{name}" if index else name
            figures.append((f"Training loss of stage {label}", plots.loss_plot(label, stage.steps, stage.terms)))
            rounds = (stage.health or {}).get("rounds", ())
            figures += schedule_plots(label, schedule_series(stage.steps, stage.evaluations, rounds))
    if any(cache.get("entropy_histogram", ())) and all(layer.get("mode") != "sample" for layer in report["layers"]):
        figures.append(
            (
                "How sure the teacher is, at most",
                plots.entropy_plot(cache["entropy_histogram"], cache["entropy_bin_nats"]),
            )
        )
    if any(cache.get("support_histogram", ())):
        figures.append(("What the cache keeps", plots.support_plot(cache["support_histogram"])))
    return figures


def _plots(figures: Sequence[tuple[str, str]]) -> str:
    cards = "".join(
        f'<figure class="card"><figcaption>{escape(title)}</figcaption>{svg}</figure>' for title, svg in figures
    )
    return f'<h2>Plots</h2><div class="plots">{cards}</div>' if cards else ""


def _heldout_table(report: Mapping[str, Any]) -> str:
    rows = tables.heldout_rows(report)
    legend = f"{tables.HELDOUT_LEGEND} {tables.bases_text(report)}"
    return _table(Table("Held-out distance by source", tables.HELDOUT_HEADER, rows, legend, 2)) if rows else ""


def _table(table: Table) -> str:
    legend = f'<p class="legend">{escape(table.legend)}</p>' if table.legend else ""
    return f"<h2>{escape(table.title)}</h2>{_element(table.header, table.rows, table.num_labels)}{legend}"


def _element(header: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int = 1) -> str:
    """Return a table, one card per row on a narrow screen; the first `num_labels` columns hold words."""
    side = ["" if column >= num_labels else ' class="w"' for column in range(len(header))]
    head = "".join(f"<th{of}>{name_of(title)}</th>" for of, title in zip(side, header, strict=True))
    body = ""
    for row in rows:
        cells = zip(side[1:], header[1:], row[1:], strict=True)
        figures = "".join(f'<td{of} data-label="{escape(title)}">{name_of(cell)}</td>' for of, title, cell in cells)
        body += f'<tr><th scope="row">{name_of(row[0])}</th>{figures}</tr>'
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="card scroll"><table class="stack">{inside}</table></div>'


def _answers_table(report: Mapping[str, Any]) -> str:
    rows = {name: model["answers"] for name, model in report["models"].items() if model["answers"]}
    if not rows:
        return ""
    columns = (
        ("answers", "count"),
        ("tokens each", "mean_tokens"),
        ("cut by length", "truncated"),
        ("same as base", "same_as_base"),
        ("same as teacher", "same_as_teacher"),
    )
    texts = [[name, *(_answer_cell(key, figures.get(key)) for _, key in columns)] for name, figures in rows.items()]
    return f"<h2>Answers</h2>{_element(['model', *(title for title, _ in columns)], texts)}"


def _answer_cell(key: str, value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:,}" if key == "count" else f"{value:.0f}" if key == "mean_tokens" else percent(value)


def _stages(report: Mapping[str, Any]) -> str:
    if not report["stages"]:
        return ""
    cards = []
    for name, stage in report["stages"].items():
        health = stage["health"] or {}
        checks = "".join(_check(str(check), bool(passed)) for check, passed in health.get("checks", {}).items())
        losses = f"{number(stage['first_loss'], 4)} to {number(stage['last_loss'], 4)}"
        state = "did not finish" if not health else "healthy" if health.get("healthy") else "not healthy"
        style = "good" if health.get("healthy") else "bad"
        stopped = f"<p>stopped: {escape(str(health['stopped']))}</p>" if health.get("stopped") else ""
        text = f'<p class="soft">{stage["steps"]} steps, loss {losses}</p>{stopped}<ul class="checks">{checks}</ul>'
        cards.append(f'<div class="card"><b>{escape(name)}</b> <span class="{style}">{state}</span>{text}</div>')
    return f'<h2>Health of the training</h2><div class="plots">{"".join(cards)}</div>'


def _check(name: str, passed: bool) -> str:
    mark = '<span class="good">✓</span>' if passed else '<span class="bad">✗</span>'
    return f"<li>{mark} {escape(name.replace('_', ' '))}</li>"


def _basis(report: Mapping[str, Any], runs: Sequence[RunFiles]) -> str:
    parts = ["<h2>What this rests on</h2>"]
    for title, value in (
        ("Identity of the cache", report["layers"]),
        ("Identity of the evaluations", report["identities"]),
    ):
        if value:
            parts.append(
                f"<details><summary>{title}</summary>"
                f"<pre>{escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre></details>"
            )
    for run in runs:
        if run.recipe_text:
            title = "Recipe" if len(runs) == 1 else f"Recipe of {escape(run.name)}"
            parts.append(f"<details><summary>{title}</summary><pre>{escape(run.recipe_text)}</pre></details>")
    return "".join(parts) if len(parts) > 1 else ""

"""The figures as rows of text: for the terminal, for report.md and for models.csv.

One table, one format of each number, three renderings. Scores are in percent, KL in nats per position.
"""

from __future__ import annotations

import csv
import io
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from shared.progress import duration
from tools.report.more_tables import more_tables
from tools.report.numbers import data_size, number, percent

_TIME = "time: "
HELDOUT_HEADER = (
    "model",
    "source",
    "positions",
    "KL",
    "top-1",
    "in top 5",
    "accepted, at least",
    "calibration error",
    "perplexity",
    "bits/byte",
)
HELDOUT_LEGEND = (
    "KL: nats per position. top-1: the model's most probable token is the teacher's; in top 5: it is among the "
    "teacher's five most probable. Accepted: the share of this model's drafts that the teacher would accept in "
    "speculative decoding, as far as the stored head tells. Calibration error: mean gap between the probability of "
    "the model's most probable token and how often it is the one that followed, in ten bins. Bits per byte of the "
    "text compare models of different tokenizers."
)


def score_domains(report: Mapping[str, Any]) -> list[str]:
    """Return the domains of all models, in order of appearance."""
    return list(dict.fromkeys(domain for model in report["models"].values() for domain in model["tasks"]))


def model_header(report: Mapping[str, Any]) -> list[str]:
    """Return the columns of the models' table."""
    domains = score_domains(report)
    mean = ["mean"] if len(domains) > 1 else []
    return ["model", *domains, *mean, "gap closed", "held-out KL", "top-1", "perplexity"]


def heldout_bases(report: Mapping[str, Any]) -> dict[str, str]:
    """Return a letter for each layer and set of rows that models were measured on; empty where all share one."""
    found = dict.fromkeys(model.get("heldout_basis") for model in report["models"].values() if model["heldout"])
    return dict(zip(map(str, found), string.ascii_lowercase, strict=False)) if len(found) > 1 else {}


def bases_text(report: Mapping[str, Any]) -> str:
    """Return what the letters stand for; empty where there are none."""
    bases = [f"({letter}) {basis}" for basis, letter in heldout_bases(report).items()]
    return f"Held-out figures with different letters do not compare: {'; '.join(bases)}." if bases else ""


def _kl_cell(report: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    letter = heldout_bases(report).get(str(model.get("heldout_basis")), "") if model["heldout"] else ""
    return number((model["heldout"] or {}).get("kl_nats"), 4) + (f" ({letter})" if letter else "")


def model_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of texts per model, as `model_header` says."""
    domains = score_domains(report)
    rows = []
    for name, model in report["models"].items():
        heldout = model["heldout"] or {}
        cells = [percent(model["tasks"].get(domain, {}).get("score")) for domain in domains]
        cells += [percent(model["mean_score"])] if len(domains) > 1 else []
        cells += [
            percent(model["gap_closed"], digits=0),
            _kl_cell(report, model),
            percent(heldout.get("top1_agreement")),
        ]
        rows.append([name, *cells, number(heldout.get("perplexity"), 2)])
    return rows


def models_legend(report: Mapping[str, Any], *columns: str) -> str:
    """Return what the columns of the models' table are: the tasks' metrics, and what is said of the others."""
    tasks = [task for model in report["models"].values() for task in model["tasks"].items()]
    metrics = {domain: task["metric"] for domain, task in tasks if "metric" in task}
    return (
        "; ".join([*(f"{domain}: {metric}" for domain, metric in metrics.items()), *columns])
        + ". "
        + bases_text(report)
    )


def heldout_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the held-out figures of each model, all sources first, then each, as `HELDOUT_HEADER` says."""
    rows = []
    for name, model in report["models"].items():
        heldout = model["heldout"]
        if heldout is None:
            continue
        sources = heldout.get("by_source") or {}
        for source, figures in {"all": heldout, **(sources if len(sources) > 1 else {})}.items():
            keys = ("top1_agreement", "top1_in_teacher_top5", "acceptance_rate", "calibration_error")
            shares = [percent(figures.get(key)) for key in keys]
            cells = [number(figures.get("positions"), 0), number(figures.get("kl_nats"), 4), *shares]
            last = [number(figures.get("perplexity"), 2), number(figures.get("bits_per_byte"), 4)]
            rows.append([name, str(source), *cells, *last])
    return rows


def run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, figure) of the cache and of each phase's time."""
    cache, rows = report["cache"], []
    if cache:
        rows += [("rows in the cache", f"{cache['rows']:,}"), ("positions", f"{cache['positions']:,}")]
        rows += [
            ("bytes per position", number(cache.get("bytes_per_position"), 1)),
            ("entries per position", number(cache.get("mean_support"), 1)),
        ]
        rows += [("teacher's entropy", _entropy(report))]
    rows += _made_rows(report)
    total = sum(report["seconds"].values())
    rows += [(f"{_TIME}{phase}", duration(seconds)) for phase, seconds in report["seconds"].items()]
    return [*rows, (f"{_TIME}all", duration(total))] if len(report["seconds"]) > 1 else rows


def _made_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return when, by what and where the models were evaluated, and how fast stages trained, as far as files say."""
    made = [model["made"] for model in report["models"].values() if model.get("made")]
    rows = []
    for what, key in (("evaluated", "date"), ("Decant", "decant"), ("machine", "machine")):
        values = list(dict.fromkeys(str(one[key]) for one in made if one.get(key)))
        shown = [max(values).replace("T", " ").replace("+00:00", " UTC")] if values and key == "date" else values
        rows += [(what, " and ".join(shown))] if shown else []
    peaks = [one for one in made if one.get("peak_memory_bytes") is not None]
    if peaks:
        largest = max(peaks, key=lambda one: one["peak_memory_bytes"])
        most, of = data_size(largest["peak_memory_bytes"]), largest.get("memory_of") or ""
        rows.append(("peak memory of evaluation", f"{most} {of}".rstrip()))
    for name, stage in report["stages"].items():
        if stage.get("tokens_per_second"):
            rows.append((f"train.{name}", f"{stage['tokens_per_second']:,.0f} tokens/s"))
    return rows


def _entropy(report: Mapping[str, Any]) -> str:
    """Return the bounds of the teacher's mean entropy: a cache has the head and one bucket, not the bucket's shape."""
    layers, cache = [layer for layer in report["layers"] if "vocab_size" in layer], report["cache"]
    least = cache.get("mean_entropy_nats")
    unknown = any(layer.get("mode") == "sample" or layer.get("tail") == "unknown" for layer in layers)
    if least is None or not layers or unknown:
        return "not known"
    most = least + cache.get("mean_tail_mass", 0.0) * math.log(max(layer["vocab_size"] for layer in layers))
    return f"{least:.2f} nats" if most - least < 0.005 else f"{least:.2f} to {most:.2f} nats"


def table_text(report: Mapping[str, Any]) -> str:
    """Return the report's table for a terminal, with the cache's figures and what is missing below it."""
    header, rows = model_header(report), model_rows(report)
    lines = _aligned([header, *rows]) if rows else ["no model was evaluated"]
    if rows:
        lines.insert(1, "-" * max(len(line) for line in lines))
    for table in more_tables(report):
        lines += ["", f"{table.title}:", *_aligned([list(table.header), *table.rows], table.num_labels)]
    facts = run_rows(report)
    cache = ", ".join(f"{what} {figure}" for what, figure in facts if not what.startswith(_TIME))
    times = ", ".join(f"{what.removeprefix(_TIME)} {figure}" for what, figure in facts if what.startswith(_TIME))
    lines += ["", *(f"{label}: {text}" for label, text in (("facts", cache), ("time", times)) if text)]
    lines += [f"note: {sentence}" for sentence in [*filter(None, [bases_text(report)]), *report["missing"]]]
    return _printable("\n".join(lines))


def markdown(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    header, rows = model_header(report), model_rows(report)
    lines = [f"# {_md(report['name'])}", ""]
    if rows:
        kl = "held-out KL: nats per position from the teacher's cached distributions"
        gap = "gap closed: share of the way from base to teacher in the mean"
        lines += _md_table(header, rows, 1, models_legend(report, gap, kl))
    if heldout := heldout_rows(report):
        lines += _md_table(HELDOUT_HEADER, heldout, 2, HELDOUT_LEGEND)
    for table in more_tables(report):
        lines += [f"## {_md(table.title)}", "", *_md_table(table.header, table.rows, table.num_labels, table.legend)]
    facts = run_rows(report)
    if facts:
        lines += ["| | |", "|---|---:|", *(f"| {_md(what)} | {_md(figure)} |" for what, figure in facts), ""]
    for name, stage in report["stages"].items():
        health = stage["health"]
        failed = [check for check, passed in (health or {}).get("checks", {}).items() if not passed]
        state = "did not finish" if health is None else "healthy" if not failed else f"failed: {', '.join(failed)}"
        state += f" ({health['stopped']})" if (health or {}).get("stopped") else ""
        losses = f"loss {number(stage['first_loss'], 4)} to {number(stage['last_loss'], 4)}"
        lines.append(f"- stage **{_md(name)}**: {stage['steps']} steps, {losses}, {_md(state)}")
    lines += ["", *(f"- missing: {_md(sentence)}" for sentence in report["missing"])] if report["missing"] else []
    return "\n".join(lines) + "\n"


def models_csv(report: Mapping[str, Any]) -> str:
    """Return models.csv: one line per model with plain numbers, empty where there is none."""
    domains = score_domains(report)
    measures = (
        "kl_nats",
        "kl_low",
        "kl_high",
        "top1_agreement",
        "top1_in_teacher_top5",
        "acceptance_rate",
        "acceptance_rate_at_most",
        "calibration_error",
        "perplexity",
        "bits_per_byte",
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{domain}_{end}" for domain in domains for end in ("score", "low", "high")]
    writer.writerow(["model", *map(_cell, ends), "mean_score", "gap_closed", *measures, "heldout_basis"])
    for name, model in report["models"].items():
        tasks, heldout = model["tasks"], model["heldout"] or {}
        cells = [tasks.get(domain, {}).get(end) for domain in domains for end in ("score", "low", "high")]
        cells += [model["mean_score"], model["gap_closed"], *(heldout.get(key) for key in measures)]
        cells = ["" if cell is None else repr(cell) for cell in cells]
        writer.writerow([_cell(name), *cells, _cell(model.get("heldout_basis") or "")])
    return out.getvalue()


def _md_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int, legend: str) -> list[str]:
    ruler = f"|{'---|' * num_labels}{'---:|' * (len(header) - num_labels)}"
    first, *others = (f"| {' | '.join(map(_md, row))} |" for row in (header, *rows))
    return [first, ruler, *others, "", _md(legend), ""]


def _aligned(rows: Sequence[Sequence[str]], num_labels: int = 1) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index < num_labels else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula, on one line."""
    plain = _printable(" ".join(text.split()))
    return f"'{plain}" if plain.startswith(("=", "+", "-", "@")) else plain


def _printable(text: str) -> str:
    """Drop what a terminal would obey: names and sentences may come from files."""
    return "".join(character for character in text if character == "\n" or character.isprintable())


def _md(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", _printable(" ".join(str(text).split())))

"""The tables beyond the first: answers side by side, cost, lm-eval; for terminal, report.md and the page.

Each is a title, a header, rows of texts and a legend; a table that a run has no figures for is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tools.report.numbers import NONE, Table, data_size, kl_spread, number, percent, times
from tools.report.teacher_tables import teachers_apart_table, teachers_table

SIDE_LEGEND = (
    "Sampled answers to the same prompts. Same as teacher, same as base: share of answers that are identical. "
    "Length: characters over the teacher's. Terms, structure: share of the teacher's technical terms, and of its "
    "steps, list items, code blocks and headings, that the answers have too. Language: share of answers in a language "
    "that neither prompt nor teacher's answer uses."
)
LM_EVAL_LEGEND = "By lm-evaluation-harness, with its standard errors."
AUDIT_HEADER = ("", "mean KL", "worst KL", "worst label", "worst tail", "top-1")
TRUNCATION_HEADER = ("k", "draws", "mass", "T", "bytes/position", "KL lost", "gradient error", "of the mean")
DIFFERENCES_HEADER = ("models", "figure", "difference", "95 % interval", "rows")
DIFFERENCES_LEGEND = (
    "KL in nats per position on the held-out rows that both have, scores in points on the questions that both "
    "answered. The differences of rows are resampled; an interval that holds 0 tells the models not apart."
)
TAILS_HEADER = ("cache", "teacher", "tail", "labels known")
TAILS_LEGEND = (
    "Tail: the mass outside the stored head is the teacher's own (exact), 1 minus what was stored of it (derived), or "
    "not known (unknown); where it is unknown, the held-out KL is that within the head, and acceptance is not known."
)
QUESTIONS_HEADER = ("task", "questions", "trained on", "held out")
QUESTIONS_LEGEND = (
    "Questions that a prompt of the cache asks, too, but for white space. A score on questions that were trained on "
    "says little about others; held-out prompts were not trained on."
)
COST_HEADER = (
    "model",
    "parameters",
    "smaller",
    "weights",
    "peak memory",
    "first token",
    "tokens/s",
    "faster",
    "tokens/s, batch",
    "faster, batch",
)
COST_LEGEND = (
    "Measured on this machine in one run, three rounds by turns, medians. First token: a request for one token. "
    "Tokens/s: greedy answers one after another, and ten prompts at once. Smaller, faster: against the teacher. "
    "Peak memory: {memory}."
)
_ALIKE = ("answers", "tokens each", "over teacher's", "cut", "repeat themselves")
OWN_HEADER = ("model", "KL", "95 % interval", "top-1", *_ALIKE)
OWN_LEGEND = (
    "Each model answers held-out prompts, sampled, and the teacher scores those answers: KL to the teacher in nats per "
    "position where the model itself leads, which the held-out KL on the teacher's answers does not see."
)
ROUNDS_HEADER = ("stage", "round", *_ALIKE)
ROUNDS_LEGEND = (
    "The student's answers of each round. Over teacher's: mean length against the recipe's cache. Repeat themselves: "
    "more than half of the runs of four tokens came before in the same answer."
)
SIDE_HEADER = (
    *("temperature", "model", "tokens each", "cut", "same as teacher", "same as base"),
    *("length", "terms", "structure", "language"),
)


def more_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return every table that the run has figures for."""
    makers: list[Callable[[Mapping[str, Any]], Table]] = [
        side_table,
        lm_eval_table,
        cost_table,
        own_table,
        rounds_table,
        faithfulness_table,
        truncation_table,
        questions_table,
        differences_table,
        tails_table,
        teachers_table,
        teachers_apart_table,
    ]
    return [table for maker in makers if (table := maker(report)).rows]


def side_table(report: Mapping[str, Any]) -> Table:
    """Return the measures of sampled answers, temperature by temperature."""
    measured = {name: model.get("side_by_side") or {} for name, model in report["models"].items()}
    rows = []
    for temperature in dict.fromkeys(temperature for figures in measured.values() for temperature in figures):
        for name, of in measured.items():
            if temperature in of:
                figures = of[temperature]
                kept = ("truncated", "same_as_teacher", "same_as_base", "length_kept", "terms_kept", "structure_kept")
                shares = [percent(figures.get(key), 0) for key in (*kept, "language_switched")]
                rows.append([temperature, name, number(figures.get("mean_tokens"), 0), *shares])
    return Table("Side by side at sampling temperatures", SIDE_HEADER, rows, SIDE_LEGEND, 2)


def own_table(report: Mapping[str, Any]) -> Table:
    """Return how close each model is to the teacher on its own answers, beside what those answers are like."""
    rows = []
    for name, model in report["models"].items():
        own = (model["heldout"] or {}).get("own")
        if own:
            cells = [
                number(own["kl_nats"], 4),
                kl_spread(own),
                percent(own.get("top1_agreement")),
                *_alike(own["answers"]),
            ]
            rows.append([name, *cells])
    return Table("On each model's own answers to held-out prompts", OWN_HEADER, rows, OWN_LEGEND, 1)


def rounds_table(report: Mapping[str, Any]) -> Table:
    """Return what the answers of every round were like, stage by stage."""
    rows = [
        [name, str(each["round"]), *_alike(each)]
        for name, stage in report["stages"].items()
        for each in (stage["health"] or {}).get("rounds", ())
    ]
    return Table("Rounds of own answers", ROUNDS_HEADER, rows, ROUNDS_LEGEND, 2)


def _alike(figures: Mapping[str, Any]) -> list[str]:
    shares = [percent(figures[key]) for key in ("cut", "repeating")]
    return [number(figures["answers"], 0), number(figures["mean_tokens"], 1), times(figures["beside_teacher"]), *shares]


def cost_table(report: Mapping[str, Any]) -> Table:
    """Return parameters, memory and speed, model by model."""
    rows, memory = [], ""
    for name, model in report["models"].items():
        if figures := model.get("cost"):
            memory = memory or str(figures.get("memory_of") or "")
            first = figures.get("seconds_to_first_token")
            cells = [
                number(figures.get("parameters"), 0),
                times(figures.get("compression")),
                data_size(figures.get("weights_bytes")),
            ]
            cells += [data_size(figures.get("memory_bytes")), NONE if first is None else f"{1000 * first:,.0f} ms"]
            for kind in ("", "_batched"):
                cells += [number(figures.get(f"tokens_per_second{kind}"), 0), times(figures.get(f"speed_up{kind}"))]
            rows.append([name, *cells])
    return Table("Cost", COST_HEADER, rows, COST_LEGEND.format(memory=memory), 1)


def faithfulness_table(report: Mapping[str, Any]) -> Table:
    """Return how far the stored distributions are from the teacher scored again."""
    faith, rows = (report.get("audit") or {}).get("faithfulness", {}), []
    for key, label in (
        ("stored", "stored against live"),
        ("control", "live against live"),
        ("codec", "live against encoded"),
    ):
        if part := faith.get(key):
            cells = [f"{part[name]:.1e}" for name in ("mean_kl", "worst_kl", "worst_label", "worst_tail")]
            rows.append([label, *cells, percent(part.get("top1_agreement"), 2)])
    wrong = len(faith.get("unfaithful", ()))
    verdict = f"{wrong} are not its own" if wrong else "all are its own"
    legend = (
        f"{faith.get('rows')} rows scored again by the teacher: {verdict}. KL and labels in nats, tails in probability."
    )
    return Table("Audit: is the cache the teacher's", AUDIT_HEADER, rows, legend, 1)


def truncation_table(report: Mapping[str, Any]) -> Table:
    """Return what captures lose, the layer's own marked with a star."""
    audit = report.get("audit") or {}
    rows = [
        [
            f"{one['k']}{' *' if one.get('own') else ''}",
            f"{one['draws']}",
            f"{one['mass']:g}",
            f"{one['temperature']:g}",
            number(one["bytes_per_position"], 1),
            *(
                NONE if one.get(key) is None else f"{one[key]:.1e}"
                for key in ("kl_lost", "gradient_error", "mean_gradient_error")
            ),
        ]
        for one in audit.get("truncation", ())
    ]
    legend = (
        "* the layer's own. KL lost: nats per position. Gradient error: against the dense gradient, at each position "
        f"and in the mean. Tails completed by {audit.get('completion')}."
    )
    return Table("Audit: what a capture loses", TRUNCATION_HEADER, rows, legend, 1)


def questions_table(report: Mapping[str, Any]) -> Table:
    """Return how many questions of each task are also among the prompts."""
    rows = [
        [domain, *(number(counts[key], 0) for key in ("questions", "trained_on", "heldout"))]
        for domain, counts in report.get("questions", {}).items()
    ]
    return Table("Task questions that are also prompts", QUESTIONS_HEADER, rows, QUESTIONS_LEGEND, 1)


def tails_table(report: Mapping[str, Any]) -> Table:
    """Return what is known of the mass outside the heads, where not every layer is the teacher's own."""
    layers = [layer for layer in report.get("layers", ()) if layer.get("mode")]
    if all("tail" not in layer and "labels" not in layer for layer in layers):
        layers = []
    rows = [
        [
            str(layer.get("path", "")),
            str(layer.get("teacher", "")),
            str(layer.get("tail", "exact")),
            "in the head" if layer.get("labels") == "head" else "all",
        ]
        for layer in layers
    ]
    return Table("Targets that others made", TAILS_HEADER, rows, TAILS_LEGEND, 2)


def differences_table(report: Mapping[str, Any]) -> Table:
    """Return how much each model differs from the one before it on common rows and questions, with 95 % intervals."""
    rows = []
    for one in report.get("differences", ()):
        pair = f"{one['model']} − {one['other']}"
        parts = [("held-out KL", one["kl_nats"], 1.0, 4)] if one["kl_nats"] else []
        parts += [(domain, part, 100.0, 1) for domain, part in one["scores"].items()]
        for what, part, scale, digits in parts:
            ends = (part["difference"], part["low"], part["high"])
            values = [f"{scale * value:+.{digits}f}" if value is not None else NONE for value in ends]
            rows.append([pair, what, values[0], f"{values[1]} to {values[2]}", number(part["rows"], 0)])
    return Table("Differences on common rows", DIFFERENCES_HEADER, rows, DIFFERENCES_LEGEND, 2)


def lm_eval_table(report: Mapping[str, Any]) -> Table:
    """Return the harness's figures: a row per task and metric, a column per model."""
    models = {name: model["lm_eval"] for name, model in report["models"].items() if model.get("lm_eval")}
    measured = dict.fromkeys(
        (task, metric) for tasks in models.values() for task, metrics in tasks.items() for metric in metrics
    )
    rows = []
    for task, metric in measured:
        cells = []
        for tasks in models.values():
            found = tasks.get(task, {}).get(metric)
            error = "" if found is None or found.get("stderr") is None else f" ± {found['stderr']:.4f}"
            cells.append(NONE if found is None else f"{found['value']:.4f}{error}")
        rows.append([str(task), str(metric), *cells])
    return Table("Published benchmarks", ("task", "metric", *models), rows, LM_EVAL_LEGEND, 2)

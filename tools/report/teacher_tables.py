"""Several teachers in the report: how far each model is from each, and they from one another.

Figures come from the evaluations (`heldout.by_layer`) and from tools/evaluate/results/teacher_distances.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.evaluate.results.teacher_distances import far_teachers
from tools.report.numbers import NONE, Table, number

MODELS_LEGEND = "KL(teacher || model) in nats per position on the same held-out rows, for each teacher of the recipe."
APART_LEGEND = (
    "KL(row || column) in nats per position, the least that fits both heads: they are at least so far apart. The "
    "student's start is the model `base`."
)


def teachers_table(report: Mapping[str, Any]) -> Table:
    """Return each model's distance to each of several teachers; no row where there is one."""
    measured = {name: (model["heldout"] or {}).get("by_layer") or {} for name, model in report["models"].items()}
    teachers = list(dict.fromkeys(teacher for layers in measured.values() for teacher in layers))
    rows = [
        [name, *(number(layers.get(teacher, {}).get("kl_nats"), 4) for teacher in teachers)]
        for name, layers in measured.items()
        if layers
    ]
    return Table("Distance to each teacher", ("model", *teachers), rows, MODELS_LEGEND, 1)


def teachers_apart_table(report: Mapping[str, Any]) -> Table:
    """Return the teachers' distances from one another and from the student's start, warning of one far from all."""
    pairs = (report.get("distances") or {}).get("pairs", ())
    distances = {(pair["of"], pair["to"]): pair["kl_nats"] for pair in pairs if pair.get("kl_nats") is not None}
    names = list(dict.fromkeys(of for of, _ in distances))
    base = (report["models"].get("base") or {}).get("heldout") or {}
    start = {name: part["kl_nats"] for name, part in (base.get("by_layer") or {}).items()}
    rows = [
        [
            name,
            *(NONE if name == other else number(distances.get((name, other)), 4) for other in names),
            number(start.get(name), 4),
        ]
        for name in names
    ]
    warnings = [f"Warning: {sentence}." for sentence in far_teachers(distances, start)]
    headless = (report.get("distances") or {}).get("without_head", ())
    warnings += [f"{name} holds drawn tokens alone, or no tail, and cannot be compared." for name in headless]
    legend = " ".join([APART_LEGEND, *warnings])
    return Table("Teachers apart", ("teacher", *names, "student's start"), rows, legend, 1)

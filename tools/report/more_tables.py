"""The tables beyond the first: sampled answers side by side, cost, lm-eval. One list for terminal, report.md and the page.

Each is a title, a header, rows of texts and a legend; a table that a run has no figures for is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.report.numbers import number, percent

SIDE_LEGEND = (
    "Sampled answers to the same prompts. Same as teacher, same as base: share of answers that are identical. Length: characters "
    "over the teacher's. Terms, structure: share of the teacher's technical terms, and of its steps, list items, code blocks and "
    "headings, that the answers have too. Language: share of answers in a language that neither prompt nor teacher's answer uses."
)
SIDE_HEADER = (
    *("temperature", "model", "tokens each", "cut", "same as teacher", "same as base"),
    *("length", "terms", "structure", "language"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the report."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    legend: str
    num_labels: int
    """Columns at the left that hold words."""


def more_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return every table that the run has figures for."""
    makers: list[Callable[[Mapping[str, Any]], Table]] = [side_table]
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

"""What moved over a stage's steps: weights, temperatures, shares of the sources and held-out KL, and over its rounds:
what the student's answers were like; as series and as plots.

Files are untrusted: what is not a finite number is left out. Series are thinned by averaging, temperatures by taking
every n-th value, so that a page with 100,000 steps stays small. Only what moved is drawn. Cost: 0.1 s per plot.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluate.results.run_shapes import is_finite
from tools.report.views.plots import COLOURS, MOST_POINTS, legend_above, short_names, svg_of, thinned

Series = dict[str, list[tuple[float, float]]]
"""Points (step, value) by name."""

_MOST_CURVES = len(COLOURS)

_SERIES = {
    "weights": ("Loss weights", "weight", 1.0, "step"),
    "temperatures": ("Temperatures", "temperature", 1.0, "step"),
    "shares": ("Shares of the sources", "share of the tokens, %", 100.0, "step"),
    "heldout_kl_nats": ("Held-out KL while training", "nats per position", 1.0, "step"),
    "answers": ("The student's answers over the rounds", "answers, or teacher's length, %", 100.0, "round"),
}
"""What is shown of a stage: title, axis, what its values are multiplied by, and over what."""
_OF_ANSWERS = {
    "cut": "cut by length",
    "repeating": "repeat themselves",
    "beside_teacher": "length beside the teacher's",
}
"""Figures of a round's answers, and what a plot calls them."""


def schedule_series(
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Series]:
    """Return what `_SERIES` names of a stage, as series by name; empty where not logged."""
    series: dict[str, Series] = {title: {} for title in _SERIES}
    for each in rounds:
        _add(series["answers"], each.get("round"), {said: each.get(name) for name, said in _OF_ANSWERS.items()})
    for row in steps:
        for title in ("weights", "temperatures"):
            _add(series[title], row["step"], row.get(title))
        tokens = row.get("tokens_by_source")
        counts = {name: value for name, value in tokens.items() if is_finite(value)} if isinstance(tokens, dict) else {}
        if (total := math.fsum(counts.values())) > 0:
            _add(series["shares"], row["step"], {name: value / total for name, value in counts.items()})
    for row in evaluations:
        parts = row.get("by_source") or {}
        named = {name: part.get("kl_nats") for name, part in parts.items()} if len(parts) > 1 else {}
        _add(series["heldout_kl_nats"], row["step"], {"all sources": row.get("kl_nats"), **named})
    return {title: {name: _thinned(title, points) for name, points in named.items()} for title, named in series.items()}


def schedule_plots(label: str, series: Mapping[str, Series]) -> list[tuple[str, str]]:
    """Return (title, SVG) for each of a stage's series that moved."""
    figures = []
    for name, (title, axis, scale, over) in _SERIES.items():
        drawn = [[value for _, value in points] for points in series[name].values()]
        if any(_drifts(values) if name == "shares" else len(set(values)) > 1 for values in drawn):
            plot = _plot(f"{name}-{label}", series[name], axis, scale, over, stepped=name == "temperatures")
            figures.append((f"{title} of stage {label}", plot))
    return figures


def _drifts(values: Sequence[float]) -> bool:
    """Tell whether a share moves: its first and last third differ by more than 0.02 and four standard errors."""
    third = len(values) // 3
    if third < 2:
        return False
    first, last = values[:third], values[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    return abs(statistics.fmean(first) - statistics.fmean(last)) > max(0.02, 4 * error)


def _plot(label: str, named: Series, axis: str, scale: float, over: str, *, stepped: bool) -> str:
    labels = short_names(named)

    def _draw(axes: Any) -> None:
        for index, (name, points) in enumerate(list(named.items())[:_MOST_CURVES]):
            xs, ys = [step for step, _ in points], [scale * value for _, value in points]
            style = "steps-post" if stepped else "default"
            axes.plot(
                xs,
                ys,
                color=COLOURS[(2 + index) % len(COLOURS)],
                linewidth=1.2,
                drawstyle=style,
                label=labels[name],
                marker="o" if over == "round" else None,
            )
        axes.set(xlabel=over, ylabel=axis)
        axes.set_ylim(bottom=0)
        if over == "round":
            axes.set_xticks(sorted({x for points in named.values() for x, _ in points}))
        axes.grid()
        legend_above(axes, 3, 1.2)

    return svg_of(label, _draw)


def _thinned(title: str, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if title == "temperatures":  # an average of two temperatures is none that was trained at
        return points[:: -(-len(points) // MOST_POINTS)] if points else []
    xs, ys = thinned([step for step, _ in points], [value for _, value in points]) if points else ([], [])
    return list(zip(xs, ys, strict=True))


def _add(series: Series, step: Any, values: Any) -> None:
    if isinstance(values, dict) and is_finite(step):
        for name, value in values.items():
            if is_finite(value):
                series.setdefault(str(name), []).append((float(step), float(value)))

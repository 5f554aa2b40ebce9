"""Two plots over a probability in ten bins: is the student as often right as sure, and where does it follow.

Cost: 0.1 s each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.report.numbers import compact
from tools.report.views.plots import INK, colour_of, legend_above, short_names, svg_of


def calibration_plot(models: Mapping[str, Any]) -> str:
    """Draw how often each model's most probable token is the one that followed, by its probability."""
    axis = ("probability of the model's most probable token, %", "it is the token that followed, %")
    return _lines("calibration", models, "calibration", *axis, diagonal=True)


def agreement_plot(models: Mapping[str, Any]) -> str:
    """Draw how often each model's most probable token is the teacher's, by the teacher's probability for it."""
    axis = ("probability of the teacher's most probable token, %", "the model's is the same, %")
    return _lines("agreement", models, "agreement_by_teacher_confidence", *axis, diagonal=False)


def has_bins(models: Mapping[str, Any], key: str) -> bool:
    """Say whether any model was measured with these bins."""
    return any((model["heldout"] or {}).get(key) for model in models.values())


def _lines(label: str, models: Mapping[str, Any], key: str, across: str, up: str, *, diagonal: bool) -> str:
    def _draw(axes: Any) -> None:
        if diagonal:
            axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, alpha=0.4, linestyle="--")
        _write_counts(axes, models, key)
        labels = short_names(models)
        for name, model in models.items():
            bins = (model["heldout"] or {}).get(key)
            if bins:
                xs, ys = ([100 * part[column] for part in bins] for column in ("confidence", "right"))
                axes.plot(
                    xs,
                    ys,
                    color=colour_of(list(models), name),
                    linewidth=1.2,
                    marker="o",
                    markersize=3,
                    label=labels[name],
                )
        axes.set(xlim=(0, 102), ylim=(0, 102), xlabel=across, ylabel=up)
        axes.grid()
        legend_above(axes, 4, 1.0)

    return svg_of(label, _draw)


def _write_counts(axes: Any, models: Mapping[str, Any], key: str) -> None:
    """Write below the curves how many positions each of the last model's bins has: a bin of eight says little."""
    bins: list[dict[str, Any]] = next(
        filter(None, ((model["heldout"] or {}).get(key) for model in reversed(list(models.values())))), []
    )
    for part in bins:
        if part.get("positions") is not None:
            place = (100 * part["confidence"], 1)
            axes.annotate(compact(part["positions"]), place, ha="center", va="bottom", fontsize=6.5, alpha=0.7)

"""Plots as small inline SVG: text stays text, and the colours of text and lines follow the page, light or dark.

Every plot is about as wide as a phone, and the page puts them side by side where there is room. Cost: 0.1 s each, 5-40
KB.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.report.numbers import kl_interval

INK = "#010203"
"""Stands for the page's text colour, replaced by currentColor."""
COLOURS = ("#7a869a", "#c98a1b", "#2f7fd1", "#1f9d6b", "#b0509e", "#d1553f", "#6a5acd", "#4c9aa8")
"""Readable on white and on dark: teacher, base, then stages in order."""
MOST_POINTS = 400
"""Longer curves are thinned by averaging, so that a page with 100,000 steps stays small."""
WIDTH, HEIGHT = 4.7, 2.9


def colour_of(models: Sequence[str], name: str) -> str:
    """Return a model's colour, the same in every plot."""
    order = [model for model in ("teacher", "base") if model in models]
    order += [model for model in models if model not in order]
    return COLOURS[order.index(name) % len(COLOURS)]


def score_plot(models: Mapping[str, Any], domains: Sequence[str]) -> str:
    """Draw the score per domain, with its 95 % interval, of every model that was asked."""

    def _draw(axes: Any) -> None:
        names = [name for name in models if any(domain in models[name]["tasks"] for domain in domains)]
        width, labels = 0.8 / len(names), short_names(names)
        for index, name in enumerate(names):
            shown = [
                (place, models[name]["tasks"][domain])
                for place, domain in enumerate(domains)
                if domain in models[name]["tasks"]
            ]
            places = [place - 0.4 + width * (index + 0.5) for place, _ in shown]
            heights = [100 * task["score"] for _, task in shown]
            below = [100 * (task["score"] - task["low"]) for _, task in shown]
            above = [100 * (task["high"] - task["score"]) for _, task in shown]
            axes.bar(places, heights, width * 0.92, color=colour_of(list(models), name), label=labels[name])
            spread = [[max(0.0, value) for value in below], [max(0.0, value) for value in above]]
            axes.errorbar(places, heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, alpha=0.55)
        axes.set_xticks(range(len(domains)), [short(domain) for domain in domains])
        axes.set(ylim=(0, 105), ylabel="score, %")
        axes.grid(axis="y")
        legend_above(axes, min(4, len(names)), 1.0)

    return svg_of("scores", _draw)


def divergence_plot(models: Mapping[str, Any]) -> str:
    """Draw every model's held-out KL with its 95 % interval, smallest at the top."""
    shown = sorted(
        ((name, model["heldout"]) for name, model in models.items() if model["heldout"]),
        key=lambda pair: -pair[1]["kl_nats"],
    )

    labels = short_names(name for name, _ in shown)

    def _draw(axes: Any) -> None:
        for place, (name, heldout) in enumerate(shown):
            kl = heldout["kl_nats"]
            low, high = kl_interval(heldout) or (kl, kl)
            axes.barh(place, kl, 0.7, color=colour_of(list(models), name))
            spread = [[max(0.0, kl - low)], [max(0.0, high - kl)]]
            axes.errorbar(kl, place, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, alpha=0.55)
            end = (max(high, kl), place)
            axes.annotate(f"{kl:.4f}", end, xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(shown)), [labels[name] for name, _ in shown])
        most = max([max(kl_interval(heldout) or [heldout["kl_nats"]]) for _, heldout in shown] + [1e-6])
        axes.set(xlim=(0, 1.22 * most), xlabel="held-out KL from the teacher, nats per position")
        axes.grid(axis="x")

    return svg_of("divergence", _draw)


def loss_plot(stage: str, steps: Sequence[Mapping[str, Any]], terms: Sequence[str]) -> str:
    """Draw a stage's loss, and its terms where there are several, over steps."""
    labels = short_names(["loss", *terms])

    def _draw(axes: Any) -> None:
        for index, term in enumerate(["loss", *terms] if len(terms) > 1 else ["loss"]):
            points = [(row["step"], row[term]) for row in steps if isinstance(row.get(term), int | float)]
            if points:
                xs, ys = thinned([float(step) for step, _ in points], [float(value) for _, value in points])
                main = index == 0
                axes.plot(
                    xs,
                    ys,
                    color=INK if main else COLOURS[2 + index % 6],
                    linewidth=1.3 if main else 1.0,
                    alpha=0.9,
                    label=labels[term],
                )
        axes.set(xlabel="step", ylabel="loss")
        axes.grid()
        if len(terms) > 1:
            legend_above(axes, 3, 1.2)

    return svg_of(f"loss-{stage}", _draw)


def entropy_plot(histogram: Sequence[int], bin_nats: float) -> str:
    """Draw how many positions have which entropy of head and bucket: a lower bound of the teacher's."""
    used = max((index for index, count in enumerate(histogram) if count), default=0) + 1
    shares = [100 * count / max(1, sum(histogram)) for count in histogram[:used]]

    def _draw(axes: Any) -> None:
        axes.bar([bin_nats * (index + 0.5) for index in range(used)], shares, bin_nats * 0.9, color=COLOURS[2])
        axes.set(xlabel="entropy of head and bucket, nats (the teacher's is at least that)", ylabel="positions, %")
        axes.grid(axis="y")

    return svg_of("entropy", _draw)


def support_plot(histogram: Sequence[int]) -> str:
    """Draw how many positions keep how many entries (bins double in width)."""
    used = [index for index, count in enumerate(histogram) if count] or [0]
    bins = range(used[0], used[-1] + 1)
    total = max(1, sum(histogram))

    def _draw(axes: Any) -> None:
        axes.bar(range(len(bins)), [100 * histogram[index] / total for index in bins], 0.85, color=COLOURS[3])
        axes.set_xticks(range(len(bins)), [_support_label(index) for index in bins])
        axes.set(xlabel="entries kept per position", ylabel="positions, %")
        axes.grid(axis="y")

    return svg_of("support", _draw)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until at most `MOST_POINTS` are left; first and last step keep their place."""
    size = -(-len(xs) // MOST_POINTS)
    if size <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), size)
    means = [sum(ys[start : start + size]) / len(ys[start : start + size]) for start in starts]
    places = [xs[min(start + size // 2, len(xs) - 1)] for start in starts]
    places[0], places[-1] = xs[0], xs[-1]
    return places, means


def _support_label(index: int) -> str:
    if index <= 1:
        return str(index)
    low, high = 2 ** (index - 1), 2**index - 1
    return f"{low}" if low == high else f"{low}–{high}"


def _shown(name: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def short(name: str) -> str:
    """Return a name that fits a plot, without what no font can show."""
    shown = _shown(name)
    return shown if len(shown) <= 16 else f"{shown[:15]}…"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return names that fit a plot; of those that would be cut to the same, the place where they differ is kept.

    >>> short_names(["kd", "a-very-long-name-of-run-1", "a-very-long-name-of-run-2"])
    {'kd': 'kd', 'a-very-long-name-of-run-1': 'a-very-lo…-run-1', 'a-very-long-name-of-run-2': 'a-very-lo…-run-2'}
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(short(name), []).append(name)
    found = {}
    for cut, same in alike.items():
        letters = zip(*(_shown(name) for name in same), strict=False)
        differ = next((place for place, each in enumerate(letters) if len(set(each)) > 1), len(min(same, key=len)))
        for name in same:
            begin = max(0, min(differ - 3, len(_shown(name)) - 6))
            found[name] = cut if len(same) == 1 else f"{cut[:9]}…{_shown(name)[begin : begin + 6]}"
    return {name: found[name] for same in alike.values() for name in same}


def legend_above(axes: Any, columns: int, handle: float) -> None:
    """Write what the colours mean above a plot, in as many columns as its names leave room for."""
    longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
    columns = min(columns, 4 if longest <= 8 else 3 if longest <= 11 else 2)
    axes.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, handlelength=handle)


def svg_of(label: str, draw: Callable[[Any], None]) -> str:
    """Return one plot as an SVG element that takes its width and text colour from the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.axisbelow": True,
        "grid.color": INK,
        "grid.alpha": 0.13,
        "grid.linewidth": 0.7,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), label)


def _inline(document: str, label: str) -> str:
    """Cut a stand-alone SVG document down to an element of a page."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    # Ids repeat from plot to plot (a clip path, a marker); a prefix keeps each to its own.
    prefix = re.sub(r"\W", "-", label)
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", element)
    element = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", element)
    return element.replace(INK, "currentColor").strip()

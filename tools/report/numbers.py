"""What a table is, and how numbers are written in it: percent, decimals, times, bytes; a dash for what there is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the report."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    legend: str
    num_labels: int
    """Columns at the left that hold words."""


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent; a dash where there is none."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def kl_interval(heldout: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of a held-out KL in nats; None where one row, or an older file, gives none."""
    low, high = heldout.get("kl_low"), heldout.get("kl_high")
    return None if low is None or high is None or heldout.get("rows") == 1 else (low, high)


def number(value: float | None, digits: int) -> str:
    """Return a number with so many decimals; a dash where there is none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def compact(count: int) -> str:
    """Return a count in at most four characters: 950, 1.2k, 34k, 5.1M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """Return seconds as `12 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return (
        f"{int(minutes)} min {int(seconds % 60):02d} s"
        if minutes < 100
        else f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
    )


def times(ratio: float | None) -> str:
    """Return a ratio as `3.9x`; a dash where there is none."""
    return NONE if ratio is None else f"{ratio:.3g}x" if ratio < 10 else f"{ratio:.0f}x"


def data_size(num_bytes: float | None) -> str:
    """Return a size in powers of ten with its unit; a dash where there is none."""
    if num_bytes is None:
        return NONE
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"

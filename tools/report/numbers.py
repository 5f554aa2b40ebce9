"""What a table is, and how numbers are written in it: percent, decimals, ratios, bytes; a dash for what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.cache.cache_commands import size

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


def kl_spread(heldout: Mapping[str, Any]) -> str:
    """Write the 95 % interval of a held-out KL; nothing where there is none."""
    interval = kl_interval(heldout)
    return f"{interval[0]:.4f}–{interval[1]:.4f}" if interval else ""


def number(value: float | None, digits: int) -> str:
    """Return a number with so many decimals; a dash where there is none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def compact(count: int) -> str:
    """Return a count in at most four characters: 950, 1.2k, 34k, 5.1M."""
    for least, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= least:
            return f"{count / least:.1f}{unit}" if count < 10 * least else f"{count / least:.0f}{unit}"
    return str(count)


def times(ratio: float | None) -> str:
    """Return a ratio as `3.9x`; a dash where there is none."""
    return NONE if ratio is None else f"{ratio:.3g}x" if ratio < 10 else f"{ratio:.0f}x"


def data_size(num_bytes: float | None) -> str:
    """Return a size in powers of ten with its unit; a dash where there is none."""
    return NONE if num_bytes is None else size(num_bytes)

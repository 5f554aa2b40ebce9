"""Held-out figures as sums that add up: one row's, then a source's, then all.

The interval of the KL needs every row's sum, so rows are kept (a few numbers each); positions never are.
Cost: linear in rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.evaluate.heldout.bootstrap import ratio_interval
from tools.evaluate.heldout.confidence_bins import ConfidenceBins


@dataclass(frozen=True, slots=True)
class RowMeasure:
    """Sums over one row's supervised positions."""

    source: str
    positions: int
    compared: int
    """Positions where the teacher has a head or drawn tokens: what the KL and agreements are means over."""
    kl_nats: float
    top1_equal: int
    top1_in_teacher_top5: int
    label_nll_nats: float
    teacher_nll_nats: float
    calibration: ConfidenceBins
    """The student's most probable token against the one that followed."""
    agreement: ConfidenceBins
    """The teacher's most probable token against the student's."""
    acceptance: float
    acceptance_at_most: float
    text_bytes: float = math.nan
    """Bytes of the supervised text, control tokens left out; NaN where the tokenizer does not tell."""
    largest: tuple[tuple[float, int], ...] = ()
    """KL in nats and position, where the row's KL is largest."""


@dataclass(slots=True)
class HeldoutSums:
    """Everything measured so far, by source."""

    rows: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: defaultdict(list))
    """Per source and row: positions, KL, top-1 equal, top-1 in the teacher's top 5, NLL, the teacher's NLL,
    acceptance and its upper bound, positions compared, bytes of text."""
    calibration: dict[str, ConfidenceBins] = field(default_factory=lambda: defaultdict(ConfidenceBins))
    agreement: dict[str, ConfidenceBins] = field(default_factory=lambda: defaultdict(ConfidenceBins))

    def add(self, row: RowMeasure) -> None:
        """Count one row."""
        agreement = (row.top1_equal, row.top1_in_teacher_top5)
        nll = (row.label_nll_nats, row.teacher_nll_nats)
        acceptance = (row.acceptance, row.acceptance_at_most)
        figures = (row.positions, row.kl_nats, *agreement, *nll, *acceptance, row.compared, row.text_bytes)
        self.rows[row.source].append(figures)
        self.calibration[row.source] = self.calibration[row.source] + row.calibration
        self.agreement[row.source] = self.agreement[row.source] + row.agreement

    def figures(self, seed: int) -> dict[str, Any]:
        """Return the figures of all rows, and by source under `by_source`."""
        names = sorted(self.rows)
        return {**self._of(names, seed), "by_source": {name: self._of([name], seed) for name in names}}

    def _of(self, sources: Sequence[str], seed: int) -> dict[str, Any]:
        rows = [row for name in sources for row in self.rows[name]]
        positions, kl, equal, in_top5, nll, teacher_nll, least, most, compared, octets = np.array(
            rows, dtype=np.float64
        ).T
        calibration = sum((self.calibration[name] for name in sources), start=ConfidenceBins())
        agreement = sum((self.agreement[name] for name in sources), start=ConfidenceBins())
        total, with_head, text_bytes = float(positions.sum()), max(float(compared.sum()), 1.0), float(octets.sum())
        # One row says nothing about how rows differ, and one without a position to compare nothing at all.
        tells = compared > 0
        low, high = ratio_interval(kl[tells], compared[tells], seed) if tells.sum() > 1 else (None, None)
        return {
            "kl_nats": math.fsum(kl) / with_head,
            "kl_low": low,
            "kl_high": high,
            "top1_agreement": float(equal.sum()) / with_head,
            "top1_in_teacher_top5": float(in_top5.sum()) / with_head,
            "acceptance_rate": _known(float(least.sum()) / with_head),
            "acceptance_rate_at_most": _known(float(most.sum()) / with_head),
            "agreement_by_teacher_confidence": agreement.figures(),
            "calibration_error": calibration.gap(),
            "calibration": calibration.figures(),
            "perplexity": _exp(math.fsum(nll) / total),
            "teacher_perplexity": _exp(math.fsum(teacher_nll) / total),
            "bits_per_byte": math.fsum(nll) / (math.log(2) * text_bytes) if text_bytes > 0 else None,
            "positions": int(total),
            "positions_compared": int(compared.sum()),
            "rows": len(rows),
        }


def _known(share: float) -> float | None:
    """Return a share, or None where the teacher's tail, and so the share, is not known."""
    return None if math.isnan(share) else share


def _exp(nats: float) -> float | None:
    """Return e to the nats, or None where that is no number that JSON has."""
    return math.exp(nats) if nats < 700 else None

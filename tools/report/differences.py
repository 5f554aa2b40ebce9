"""How much models differ on what they have in common: the same held-out rows and the same questions, row by row.

Intervals of two models overlap more often than the models fail to differ, since both met the same rows; so the
difference of each row is resampled (`bootstrap`). KLs are compared where both were measured on one layer, on the rows
that both have with as many positions; scores on questions of the same text. Each student stands against the one before
it (the first against base), and a later run's model against the first run's of its name. Cost: linear in rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.evaluate.heldout.bootstrap import ratio_interval


@dataclass(frozen=True, slots=True)
class Measured:
    """One model of the report and where it was measured."""

    run: str
    model: str
    """Its name in its run."""
    role: str
    """teacher, base or student."""
    heldout: Mapping[str, Any] | None
    answers: Sequence[Mapping[str, Any]]


def differences(models: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Return pair by pair: model, other, kl_nats and scores.DOMAIN, each {difference, low, high, rows}."""
    found = []
    scores = {name: _scores(of.answers) for name, of in models.items()}
    for name, other in _pairs(models):
        kl = _kl(models[name].heldout or {}, models[other].heldout or {})
        domains = list(dict.fromkeys(key[0] for key in scores[name] if key in scores[other]))
        by_domain = {domain: _score(domain, scores[name], scores[other]) for domain in domains}
        if kl or by_domain:
            found.append({"model": name, "other": other, "kl_nats": kl, "scores": by_domain})
    return found


def _pairs(models: Mapping[str, Measured]) -> list[tuple[str, str]]:
    pairs, first_run = [], next(iter(models.values())).run if models else ""
    by_run: dict[str, list[str]] = defaultdict(list)
    for name, of in models.items():
        by_run[of.run].append(name)
    for run, names in by_run.items():
        students = [name for name in names if models[name].role == "student"]
        before = [name for name in names if models[name].role == "base"] + students
        pairs += [(name, before[before.index(name) - 1]) for name in students if before.index(name)]
        same = {models[name].model: name for name in by_run[first_run]}
        pairs += [(name, same[models[name].model]) for name in names if run != first_run and models[name].model in same]
    return pairs


def _kl(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    rows, others = own.get("row_kl") or {}, other.get("row_kl") or {}
    shared = sorted(key for key, (positions, _) in rows.items() if key in others and others[key][0] == positions)
    if not shared or own.get("layer") != other.get("layer"):
        return None
    return _interval([rows[key][1] - others[key][1] for key in shared], [rows[key][0] for key in shared])


def _score(domain: str, own: Mapping[Any, float], other: Mapping[Any, float]) -> dict[str, Any]:
    shared = [key for key in own if key in other and key[0] == domain]
    return _interval([own[key] - other[key] for key in shared], [1] * len(shared))


def _interval(sums: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    values, over = np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64)
    low, high = ratio_interval(values, over, seed=0) if len(sums) > 1 else (None, None)
    return {"difference": float(values.sum() / max(over.sum(), 1)), "low": low, "high": high, "rows": len(sums)}


def _scores(answers: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return (domain, prompt) -> mean score over samples."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in answers:
        if row.get("score") is not None:
            found[row["domain"], row["prompt"]].append(row["score"])
    return {key: sum(values) / len(values) for key, values in found.items()}

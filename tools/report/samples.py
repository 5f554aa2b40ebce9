"""Which answers to show side by side: per domain, first where the last model is right and the student before is not.

A falling loss proves nothing, and neither does one number: a reader wants to see what changed. Chosen without
randomness, so that the same run always shows the same answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.report.run_files import RunFiles

PER_DOMAIN = 20
MOST_ANSWERS = 20_000
"""Looked at per model, at most."""
MOST_CHARACTERS = 1_200
"""Shown of any one text."""

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, overrides of the writing direction, halves of a character."""


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """One model's answer to a sample question."""

    text: str
    score: float | None
    """None where answers are only read, not scored."""
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with every model's answer."""

    domain: str
    prompt: str
    reference: str
    answers: dict[str, SampleAnswer]
    students: tuple[str, ...]
    """Those of them that learn."""


def choose_samples(run: RunFiles, per_domain: int = PER_DOMAIN) -> list[Sample]:
    """Return samples of every domain from models' answers, those that tell models apart first."""
    table: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, rows in run.answers.items():
        for row in rows[:MOST_ANSWERS]:
            if row.get("score") is not None:
                table[row["domain"], row["question"]].setdefault(name, row)
    found: list[Sample] = []
    for domain in dict.fromkeys(domain for domain, _ in table):
        questions = [number for of, number in table if of == domain]
        ranked = sorted(questions, key=lambda number: (-_interest(run, table[domain, number]), number))
        found += [_sample(run, domain, table[domain, number]) for number in ranked[:per_domain]]
    return found


def side_samples(run: RunFiles) -> list[Sample]:
    """Return sampled answers prompt by prompt, by temperature, as `read_side_answers` found them."""
    table: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, of in run.side_answers.items():
        for temperature, given in of.items():
            for number, row in given.items():
                table[temperature, number][name] = {**row, "score": None, "reason": None}
    return [
        _sample(run, f"temperature {temperature}", table[temperature, number])
        for temperature in dict.fromkeys(temperature for temperature, _ in table)
        for number in sorted(number for at, number in table if at == temperature)[:PER_DOMAIN]
    ]


def _interest(run: RunFiles, answers: Mapping[str, Mapping[str, Any]]) -> float:
    """Return how much a question says: the last model's lead over the student before, then any spread of models."""
    scores = {name: float(row["score"]) for name, row in answers.items()}
    spread = max(scores.values()) - min(scores.values())
    students = _students(run, scores)
    lead = scores[students[-1]] - scores["base"] if students and "base" in scores else 0.0
    return 2 * lead + spread


def _students(run: RunFiles, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if run.role_of(name) == "student")


def _sample(run: RunFiles, domain: str, answers: Mapping[str, Mapping[str, Any]]) -> Sample:
    first = next(iter(answers.values()))
    shown = {
        name: SampleAnswer(cut(row.get("answer")), row.get("score"), cut(row.get("reason"))[:200])
        for name, row in answers.items()
    }
    return Sample(domain, cut(first.get("prompt")), cut(first.get("reference")), shown, _students(run, shown))


def cut(text: Any) -> str:
    """Return at most `MOST_CHARACTERS` of a text, marked where it was cut, without what steers a reader's screen."""
    shown = _STEERING.sub("\ufffd", "" if text is None else str(text))
    return shown if len(shown) <= MOST_CHARACTERS else shown[:MOST_CHARACTERS] + " …"

"""The answers side by side as HTML: a box to search and filter, then by domain the questions that tell models apart.

The first few of each domain are open, the rest folded. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.report.escaped import escape
from tools.report.numbers import percent
from tools.report.samples import Sample, SampleAnswer
from tools.report.views import plots

OPEN_PER_DOMAIN = 3
"""Questions of a domain that are not folded away."""

OUTCOMES = {
    "better": "a student is right where the student before is wrong",
    "worse": "a student is wrong where the student before is right",
    "teacher": "the teacher is right and no student is",
    "wrong": "every model is wrong",
}
"""What a reader may filter by."""


def answers_section(samples: Sequence[Sample], models: Sequence[str]) -> str:
    """Return the section of a page that shows answers; nothing where there are none."""
    if not samples:
        return ""
    domains = list(dict.fromkeys(sample.domain for sample in samples))
    parts = [
        "<h2>Side by side</h2>",
        '<p class="soft">Questions that tell the models apart, as they answered them.</p>',
        _box(domains),
    ]
    for domain in domains:
        cards = [_sample(sample, models) for sample in samples if sample.domain == domain]
        shown, folded = cards[:OPEN_PER_DOMAIN], cards[OPEN_PER_DOMAIN:]
        more = (
            f'<details class="more"><summary>{len(folded)} more</summary>{"".join(folded)}</details>' if folded else ""
        )
        parts.append(f'<section class="domain"><h3>{escape(domain)}</h3>{"".join(shown)}{more}</section>')
    return "".join(parts)


def outcomes(sample: Sample) -> list[str]:
    """Return the names of `OUTCOMES` that hold for a question."""
    right = {name: answer.score >= 1 for name, answer in sample.answers.items() if answer.score is not None}
    if not right:
        return []
    students = [right[name] for name in sample.students if name in right]
    before = right.get("base")
    holds = {
        "better": before is False and any(students),
        "worse": before is True and not all(students),
        "teacher": right.get("teacher") is True and bool(students) and not any(students),
        "wrong": not any(right.values()),
    }
    return [name for name, found in holds.items() if found]


def _box(domains: Sequence[str]) -> str:
    """Return the search box; it is hidden until the script that serves it runs."""
    domain_choices = "".join(f'<option value="{escape(domain)}">{escape(domain)}</option>' for domain in domains)
    outcome_choices = "".join(f'<option value="{name}">{escape(text)}</option>' for name, text in OUTCOMES.items())
    return (
        '<div id="filter" class="card filter" hidden>'
        '<input name="search" type="search" placeholder="Search questions and answers" '
        'aria-label="Search questions and answers">'
        f'<select name="domain" aria-label="Domain"><option value="">every domain</option>{domain_choices}</select>'
        f'<select name="outcome" aria-label="Outcome"><option value="">every outcome</option>{outcome_choices}</select>'
        '<output class="soft"></output></div>'
    )


def _sample(sample: Sample, models: Sequence[str]) -> str:
    answers = "".join(_answer(name, sample.answers[name], models) for name in models if name in sample.answers)
    question = f'<div class="who">Question</div><pre>{escape(sample.prompt)}</pre>'
    reference = (
        f"<details><summary>Reference</summary><pre>{escape(sample.reference)}</pre></details>"
        if sample.reference
        else ""
    )
    data = f'data-domain="{escape(sample.domain)}" data-outcome="{" ".join(outcomes(sample))}"'
    return f'<div class="card sample" {data}>{question}{reference}<div class="answers">{answers}</div></div>'


def _answer(name: str, answer: SampleAnswer, models: Sequence[str]) -> str:
    style, verdict = "soft", "" if answer.score is None else percent(answer.score, 0)
    if answer.score is not None and not 0 < answer.score < 1:
        style, verdict = ("good", "right") if answer.score >= 1 else ("bad", "wrong")
    reason = f' <span class="soft">{escape(answer.reason)}</span>' if answer.reason else ""
    colour = plots.colour_of(models, name)
    head = f'<div><span class="who">{escape(name)}</span> <span class="{style}">{verdict}</span>{reason}</div>'
    return f'<div style="border-color:{colour}">{head}<pre>{escape(answer.text) or "(nothing)"}</pre></div>'

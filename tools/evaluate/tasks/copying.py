"""Copying from the context: a value that a long prompt names has to come back: {"prompt", "value": "482", "reference"}.

An answer scores 1 when it names the value as a word of its own and none of the row's `others` (a list, such as the
prompt's other values), so that repeating the whole prompt earns nothing. What the answer says besides does not matter.
Distilled models are known to lose this first (2509.01649).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tools.evaluate.tasks.questions import Question, Score, TaskKind, one_by_one, text_column, texts_column


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return prompt and reference answer."""
    prompt, reference = text_column(row, "prompt"), text_column(row, "reference")
    value = text_column(row, "value")
    if value in (texts_column(row, "others", fewest=0) if "others" in row else ()):
        raise ValueError(f"the value {value!r:.60} is also one of 'others'")
    if not _names(prompt, value):
        raise ValueError(f"the prompt does not name the value {value!r:.60}")
    return prompt, reference


def _score(question: Question, answer: str) -> Score:
    """Give 1 for the value alone, 0 otherwise."""
    row = question.row
    wrong = [other for other in row.get("others", []) if _names(answer, other)]
    if wrong:
        return Score(0.0, f"names {', '.join(wrong):.60} instead of {row['value']}")
    return Score(1.0) if _names(answer, row["value"]) else Score(0.0, f"does not name {row['value']}")


def _names(text: str, value: str) -> bool:
    """Whether a text holds the value with no letter or digit on either side.

    >>> _names("The code is 482.", "482"), _names("It is 4821.", "482")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


score_answers = one_by_one(_score)
TASK = TaskKind("the asked value came back, and no other", read_row, score_answers)

"""Free answers that must name the right things: {"prompt", "keywords": ["disk", ...], "reference": "..."}.

An answer's score is the share of keywords that occur in it, whatever their case and the white space inside them. A
keyword is found inside a longer word, too ("restart" in "restarted").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.evaluate.tasks.questions import Question, Score, TaskKind, one_by_one, text_column, texts_column


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return prompt and reference answer."""
    prompt, reference = text_column(row, "prompt"), text_column(row, "reference")
    texts_column(row, "keywords")
    return prompt, reference


def _score(question: Question, answer: str) -> Score:
    """Give the share of the keywords that are named."""
    words, text = question.row["keywords"], plain(answer)
    missing = [word for word in words if plain(word) not in text]
    return Score(1 - len(missing) / len(words), f"not named: {', '.join(missing)}" if missing else "")


def plain(text: str) -> str:
    """Return text without case and with single spaces.

    >>> plain("512  MB")
    '512 mb'
    """
    return " ".join(text.casefold().split())


score_answers = one_by_one(_score)
TASK = TaskKind("share of keywords named", read_row, score_answers)

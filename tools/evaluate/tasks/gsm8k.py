"""Word problems with one number as the answer, in the published shape of GSM8K: {"question", "answer": "... #### 72"}.

Exact match of numbers: the one after the last `####` of an answer, else the last number in it, against the reference's;
commas, currency signs and trailing zeros do not matter. Cobbe et al., Training Verifiers to Solve Math Word Problems
(2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tools.evaluate.tasks.questions import Question, Score, TaskKind, one_by_one, text_column

_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MAX_DIGITS = 60
"""A longer run of digits is no answer, and cost to compare."""


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return question and worked answer."""
    question, answer = text_column(row, "question"), text_column(row, "answer")
    if "####" not in answer or final_number(answer) is None:
        raise ValueError(f"the answer ends in no number after '####': {answer[-60:]!r}")
    return question, answer


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, else the last number of the text, or None where there is none.

    >>> final_number("so $1,200.50 each")
    Decimal('1200.50')
    """
    after = _NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    numbers = [after.group()] if after else [match.group() for match in _NUMBER.finditer(text)]
    if not numbers:
        return None
    digits = re.sub(r"[$,]", "", numbers[-1])
    return Decimal(digits) if len(digits) <= _MAX_DIGITS else None


def _score(question: Question, answer: str) -> Score:
    """Give 1 for the reference's number, 0 otherwise."""
    wanted, found = final_number(text_column(question.row, "answer")), final_number(answer)
    if found is None:
        return Score(0.0, "no number")
    return Score(1.0) if found == wanted else Score(0.0, f"{found} instead of {wanted}")


score_answers = one_by_one(_score)
TASK = TaskKind("exact match of the final number", read_row, score_answers)

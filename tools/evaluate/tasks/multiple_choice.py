"""Questions whose answer is one of several given texts, decided by likelihood: nothing is generated.

Two published shapes of a row:
- PubMedQA's {"QUESTION", "CONTEXTS": [...], "final_decision": "yes" | "no" | "maybe"}: the prompt is the abstract, the
  question and `Answer:`; the choices are yes, no and maybe. Jin et al., PubMedQA: A Dataset for Biomedical Research QA
  (1909.06146).
- {"question", "choices": [...], "answer"}: the prompt is the question; the answer is the right choice's number from 0,
  its text, or its letter (A is the first) where no choice has that text.

Every choice is scored as a continuation of the prompt. The score is the share of questions whose right choice has the
greatest log-probability, summed over its tokens; `by_token` and `by_byte` are the same with that sum divided by the
choice's tokens or UTF-8 bytes, which do not favour short choices. Of equal choices the first counts as chosen.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tools.evaluate.tasks.questions import Asked, Question, Score, TaskKind, one_by_one, text_column, texts_column

PUBMEDQA_CHOICES = ("yes", "no", "maybe")


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt and the right choice's text."""
    right = choices_of(row)[_right(row)]
    if "QUESTION" not in row:
        return text_column(row, "question"), right
    contexts = row.get("CONTEXTS")
    if not isinstance(contexts, list) or not contexts or not all(isinstance(text, str) for text in contexts):
        raise ValueError(f"the column 'CONTEXTS' is {contexts!r:.60}, expected a list of texts")
    return f"Abstract: {' '.join(contexts)}\nQuestion: {text_column(row, 'QUESTION')}\nAnswer:", right


def choices_of(row: Mapping[str, Any]) -> list[str]:
    """Return the choices of a row; ValueError where it has none."""
    if "QUESTION" in row:
        return list(PUBMEDQA_CHOICES)
    choices = [choice.strip() for choice in texts_column(row, "choices", fewest=2)]
    if len(set(choices)) < len(choices):
        raise ValueError(f"the column 'choices' names one choice twice: {row['choices']!r:.60}")
    return choices


def _score(question: Question, answer: str) -> Score:
    """Give 1 for the text of the right choice, 0 otherwise."""
    right = question.reference
    return Score(1.0) if answer == right else Score(0.0, f"{answer} instead of {right}")


def normalised_scores(asked: Sequence[Asked]) -> dict[str, float]:
    """Return the shares of questions that are right when log-probabilities are divided by tokens, and by bytes."""
    measures = {"by_token": lambda choice: choice.nats_per_token, "by_byte": lambda choice: choice.nats_per_byte}
    return {
        name: fmean(max(one.choices, key=value).text == one.question.reference for one in asked)
        for name, value in measures.items()
    }


def _right(row: Mapping[str, Any]) -> int:
    choices = choices_of(row)
    name = "final_decision" if "QUESTION" in row else "answer"
    answer = row.get(name)
    if isinstance(answer, int) and not isinstance(answer, bool) and name == "answer":
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        if answer.strip() in choices:
            return choices.index(answer.strip())
        letters = string.ascii_uppercase[: len(choices)]
        if name == "answer" and len(answer.strip()) == 1 and answer.strip() in letters:
            return letters.index(answer.strip())
    wanted = (
        "one of yes, no, maybe"
        if name == "final_decision"
        else f"a number from 0 to {len(choices) - 1}, a letter or a choice"
    )
    raise ValueError(f"the column '{name}' is {answer!r:.60}, expected {wanted}")


score_answers = one_by_one(_score)
TASK = TaskKind(
    "share of questions whose right choice is the most likely",
    read_row,
    score_answers,
    choices_of=choices_of,
    more_figures=normalised_scores,
)

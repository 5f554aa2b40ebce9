"""Functions to write, in HumanEval's published shape: {"task_id", "prompt", "entry_point", "canonical_solution",
"test"}.

An answer passes when the problem's own `check(function)` runs to its end in the sandbox. pass@k over n samples with c
correct ones is the unbiased 1 - C(n-c, k) / C(n, k); the score is pass@1. Chen et al., Evaluating Large Language Models
Trained on Code (2107.03374).
Only the standard library can be imported. Cost: one interpreter start per answer, 30-50 ms, two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluate import sandbox
from tools.evaluate.code_answer import program_of
from tools.evaluate.questions import Question, Score, text_column

METRIC = "pass@1: the function passes its tests"


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt and the canonical body."""
    entry_point = text_column(row, "entry_point")
    if not entry_point.isidentifier():
        raise ValueError(f"the column 'entry_point' is {entry_point!r:.60}, expected a function's name")
    if "def check(" not in text_column(row, "test"):
        raise ValueError("the column 'test' defines no `check(candidate)`")
    return text_column(row, "prompt"), text_column(row, "canonical_solution")


def program(question: Question, answer: str) -> str:
    """Return the program that passes if the answer is right."""
    row = question.row
    function = program_of(row["prompt"], answer, row["entry_point"])
    # The tests come through a string, so that an answer with an open quote or bracket cannot swallow them.
    tests = f"exec(compile({row['test']!r}, 'tests', 'exec'), globals())\ncheck({row['entry_point']})"
    return f"exec(compile({function!r}, 'answer', 'exec'), globals())\n{tests}\n"


def score_answers(pairs: Sequence[tuple[Question, str]], allow_unsafe_code: bool = False) -> list[Score]:
    """Run every answer against its tests.

    Raises:
        EvaluationError: no sandbox works on this machine and the user did not allow code without one.
    """
    mechanism = sandbox.require(allow_unsafe_code)
    verdicts = sandbox.run_many([program(question, answer) for question, answer in pairs], mechanism=mechanism)
    return [Score(float(verdict.passed), verdict.reason) for verdict in verdicts]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k.

    >>> pass_at_k(5, 1, 1)
    0.2
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples is not defined")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)

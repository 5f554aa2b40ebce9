"""Functions to write, as published: {"task_id", "prompt", "entry_point", "canonical_solution", "test"} (HumanEval).

An answer passes when the problem's own `check(function)` runs to its end in the sandbox. The answer's code is in
another process than the tests, and only data crosses (`function_calls`): nothing that it defines, patches or looks
into can change the verdict, and a function that is to change its argument in place, or takes or returns a function,
cannot be tested.

pass@k over n samples with c correct ones is the unbiased 1 - C(n-c, k) / C(n, k); the score is pass@1. Chen et al.,
Evaluating Large Language Models Trained on Code (2107.03374).
Only the standard library can be imported. Cost: two interpreter starts per answer, 60-100 ms, two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.evaluate.sandbox import function_calls, sandbox
from tools.evaluate.tasks.code_answer import preamble_of, program_of
from tools.evaluate.tasks.questions import Asked, Question, Score, TaskKind, text_column


def read_row(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt and the canonical body."""
    entry_point = text_column(row, "entry_point")
    if not entry_point.isidentifier():
        raise ValueError(f"the column 'entry_point' is {entry_point!r:.60}, expected a function's name")
    if "def check(" not in text_column(row, "test"):
        raise ValueError("the column 'test' defines no `check(candidate)`")
    return text_column(row, "prompt"), text_column(row, "canonical_solution")


def programs(question: Question, answer: str) -> tuple[str, str]:
    """Return the program that passes if the answer is right, and the one beside it that has the answer's code."""
    row, calls = question.row, Path(function_calls.__file__).read_text(encoding="utf-8")
    helpers = preamble_of(row["prompt"], row["entry_point"])
    tests = f"""
function = execute("tests", {helpers!r})[{row["entry_point"]!r}] = caller(PIPES)
execute("tests", {row["test"]!r})["check"](function)
"""
    code = program_of(row["prompt"], answer, row["entry_point"])
    return calls + tests, f"{calls}\nserve(execute('answer', {code!r})[{row['entry_point']!r}], PIPES)\n"


def score_answers(pairs: Sequence[tuple[Question, str]], allow_unsafe_code: bool = False) -> list[Score]:
    """Run every answer against its tests.

    Raises:
        EvaluationError: no sandbox works on this machine and the user did not allow code without one.
    """
    mechanism = sandbox.require(allow_unsafe_code)
    verdicts = sandbox.run_many([programs(question, answer) for question, answer in pairs], mechanism=mechanism)
    return [Score(float(verdict.passed), verdict.reason) for verdict in verdicts]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k.

    >>> pass_at_k(5, 1, 1)
    0.2
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples is not defined")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_at_samples(asked: Sequence[Asked]) -> dict[str, float]:
    """Return pass@k for as many samples as were drawn, where there is more than one."""
    k = len(asked[0].scores)
    correct = [sum(score.value == 1.0 for score in one.scores) for one in asked]
    return {f"pass@{k}": math.fsum(pass_at_k(k, num, k) for num in correct) / len(asked)} if k > 1 else {}


TASK = TaskKind(
    "pass@1: the function passes its tests", read_row, score_answers, runs_code=True, more_figures=pass_at_samples
)

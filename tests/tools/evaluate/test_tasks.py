"""Task files and scorers: published data scores 100 % with its own answers and 0 % with broken ones; odd answers; bad
rows.
"""

from __future__ import annotations

import gzip
import itertools
import json
from decimal import Decimal
from pathlib import Path

import pytest

from shared.errors import EvaluationError
from shared.recipe.recipe import Task
from tools.evaluate.sandbox import sandbox
from tools.evaluate.tasks import copying, gsm8k, humaneval, keywords
from tools.evaluate.tasks.code_answer import program_of
from tools.evaluate.tasks.questions import Question, Score, read_questions
from tools.evaluate.tasks.registry import aggregate, task_kind, wilson_interval

DATA = Path(__file__).parents[4] / "shared" / "data"
GSM8K, HUMANEVAL = DATA / "gsm8k" / "train.jsonl", DATA / "humaneval" / "HumanEval.jsonl.gz"


def questions_of(name: str, path: Path, **settings: object) -> list[Question]:
    task = Task.model_validate({"name": name, "path": str(path), **settings})
    return read_questions(task, task_kind(task))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.skipif(not GSM8K.exists(), reason="the published GSM8K data is not beside the checkout")
def test_gsm8k_answers_score_all_right_and_neighbours_all_wrong() -> None:
    questions = questions_of("gsm8k", GSM8K)
    assert len(questions) == 7473
    assert all(score.value == 1 for score in gsm8k.score_answers([(q, q.reference) for q in questions]))
    assert all(
        score.value == 1
        for score in gsm8k.score_answers([(q, f"It is ${q.reference.split('#### ')[1]}.00.") for q in questions])
    )
    wrong = [(q, f"#### {gsm8k.final_number(q.reference) + 1}") for q in questions]
    assert not any(score.value for score in gsm8k.score_answers(wrong))
    assert not any(score.value for score in gsm8k.score_answers([(q, "I do not know.") for q in questions]))


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="the published HumanEval data is not beside the checkout")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_humaneval_solutions_pass_in_every_form_and_broken_ones_do_not(every: int) -> None:
    if sandbox.available() is None:
        pytest.skip("no sandbox works on this machine")
    questions = questions_of("humaneval", HUMANEVAL)
    assert len(questions) == 164
    questions = questions[::every]
    answers = []
    for index, question in enumerate(questions):
        plain, whole = question.reference, question.row["prompt"] + question.reference
        answers.append(
            [plain, f"Sure!\n```python\n{whole}\n```\nIt works.", plain + "\n\nThat is all, folks!\n", whole][index % 4]
        )
    scores = humaneval.score_answers(list(zip(questions, answers, strict=True)))
    assert [(q.row["task_id"], s.reason) for q, s in zip(questions, scores, strict=True) if s.value != 1] == []
    broken = [
        "    return None\n",
        "    import sys; sys.exit(0)\n",
        "I cannot.",
        "    return '''open",
        "```python\ndef other(): pass\n```",
    ]
    scores = humaneval.score_answers(list(zip(questions, itertools.cycle(broken), strict=False)))
    assert [score.value for score in scores] == [0.0] * len(questions)


def test_final_numbers() -> None:
    cases = {
        "a #### 72": "72", "#### $1,234": "1234", "#### -5": "-5", "1 #### 2 #### 3.50": "3.5",
        "no marker, 18 apples.": "18",
        "#### none, but 7 before": "7", "it costs $1,000,000.00!": "1000000", "16-3=13": "13", "0.5": "0.5",
        "####12 and 13": "12",
    }  # fmt: skip
    assert {text: gsm8k.final_number(text) for text in cases} == {
        text: Decimal(number) for text, number in cases.items()
    }
    assert gsm8k.final_number("none") is None
    assert gsm8k.final_number("9" * 100_000) is None


def test_keywords_are_shared_out_whatever_case_and_spacing(tmp_path: Path) -> None:
    row = {"prompt": "why?", "keywords": ["full disk", "Orders", "node3", "free space"], "reference": "r"}
    question = questions_of("keywords", write(tmp_path / "a.jsonl", [row]))[0]
    scores = keywords.score_answers(
        [(question, "FULL\n disk on node3"), (question, ""), (question, "orders full disk node3 free space")]
    )
    assert [score.value for score in scores] == [0.5, 0.0, 1.0]
    assert scores[0].reason == "not named: Orders, free space"


COPYING = {"prompt": "orders 482; mailer 119; 4821", "value": "482", "others": ["119"], "reference": "orders 482"}


def test_a_copied_value_counts_as_a_word_of_its_own_and_alone(tmp_path: Path) -> None:
    question = questions_of("copying", write(tmp_path / "a.jsonl", [COPYING]))[0]
    answers = ["It says orders 482.", "482", "4821", "orders 119", "", question.prompt]
    scores = copying.score_answers([(question, answer) for answer in answers])
    assert [score.value for score in scores] == [1, 1, 0, 0, 0, 0]
    assert (scores[2].reason, scores[3].reason) == ("does not name 482", "names 119 instead of 482")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": "48"}, "the prompt does not name the value '48'"),
        ({"others": "119"}, "the column 'others' is '119', expected a list of texts"),
        ({"others": ["119", "482"]}, "the value '482' is also one of 'others'"),
    ],
)
def test_a_row_that_cannot_tell_copying_is_refused(tmp_path: Path, change: dict, reason: str) -> None:
    with pytest.raises(EvaluationError, match=f"a.jsonl:1: not a row of the task 'copying': {reason}"):
        questions_of("copying", write(tmp_path / "a.jsonl", [COPYING | change]))


PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef f(x):\n    """Double."""\n'


@pytest.mark.parametrize(
    "answer",
    [
        "    return helper(x) * 2\n",
        "return helper(x) * 2",
        "y = helper(x)\nreturn y * 2",
        "y = helper(x)\n    return y * 2\n",
        "    return helper(x) * 2\n\ndef g():\n    return 1\n\nprint(f(1))\nHope this helps",
        "```python\ndef f(x):\n    return helper(x) * 2\n```",
        "```\n    return helper(x) * 2\n```",
        "First:\n```python\nprint('hi')\n```\nthen\n```python\ndef f(x):\n    return helper(x) * 2\n```",
        "Here it is:\n\ndef f(x):\n    return helper(x) * 2\n\nThis function doubles it's input.",
        "```python\ndef f(x):\n    y = math.floor(helper(x)) * 2\n    return y\n",
        "  ```python\n  def f(x):\n      return helper(x) * 2\n  ```",
    ],
)
def test_code_is_found_in_answers_of_many_shapes(answer: str) -> None:
    scope: dict = {}
    exec(program_of(PROMPT, answer, "f"), scope)
    assert scope["f"](21) == 42


def test_pass_at_k_equals_counting_subsets() -> None:
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert humaneval.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_scores_average_samples_then_questions() -> None:
    task = Task.model_validate({"name": "humaneval", "path": "x.jsonl", "samples": 4, "temperature": 0.7})
    question = Question("x:1", "p", "r", {})
    values = [1, 0, 0, 0, 0, 0, 0, 0]
    found = aggregate(task, [question, question], [Score(float(value)) for value in values])
    assert (found.score, found.num_questions) == (0.125, 2)
    assert found.extra == {"pass@4": 0.5}
    assert found.low < 0.125 < found.high


def test_wilson_interval_agrees_with_the_quadratic_it_solves() -> None:
    for share, count in itertools.product((0.0, 0.1, 0.5, 1.0), (1, 10, 200)):
        for end in wilson_interval(share, count):
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)


def test_shots_come_first_and_are_not_asked(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)]
    asked = questions_of("gsm8k", write(tmp_path / "a.jsonl", rows), shots=2, limit=3, prompt_template="Q: {prompt}")
    assert [q.prompt for q in asked] == ["Q: q2", "Q: q3", "Q: q4"]
    assert asked[0].shots == (("Q: q0", "#### 0"), ("Q: q1", "#### 1"))


def test_gzip_is_read_like_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question": "q", "answer": "#### 1"}\n\n'))
    assert [q.prompt for q in questions_of("gsm8k", path)] == ["q"]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("gsm8k", '{"question": "q"}', "'answer' is missing"),
        ("gsm8k", '{"question": "q", "answer": "five"}', "no number after '####'"),
        ("gsm8k", "[1]", "expected a JSON object"),
        ("gsm8k", "{", "expected a JSON object"),
        ("gsm8k", '{"question": "a", "question": "b", "answer": "#### 1"}', "the key 'question' twice"),
        ("keywords", '{"prompt": "p", "reference": "r", "keywords": []}', "'keywords' is []"),
        (
            "humaneval",
            '{"prompt": "p", "entry_point": "f(", "test": "def check(f): pass", "canonical_solution": "s"}',
            "'entry_point'",
        ),
        (
            "humaneval",
            '{"prompt": "p", "entry_point": "f", "test": "x", "canonical_solution": "s"}',
            "check(candidate)",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, name: str, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(EvaluationError) as caught:
        questions_of(name, path)
    assert f"{path}:2" in str(caught.value)
    assert says in str(caught.value)


def test_files_that_are_missing_truncated_or_too_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file"):
        questions_of("gsm8k", tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"question": "q", "answer": "#### 1"}\n' * 1000)[:60])
    with pytest.raises(EvaluationError, match="cannot read"):
        questions_of("gsm8k", cut)
    with pytest.raises(EvaluationError, match="leave no question"):
        questions_of("gsm8k", write(tmp_path / "a.jsonl", [{"question": "q", "answer": "#### 1"}]), shots=1)
    with pytest.raises(EvaluationError, match="names the column 'nothing'"):
        questions_of("gsm8k", tmp_path / "a.jsonl", prompt_template="{nothing}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_questions_in_another_encoding_are_named_with_what_converts_them(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes('{"question": "2 + 2", "answer": "#### 4"}\n'.encode(encoding))
    with pytest.raises(EvaluationError, match=f"q.jsonl:1: the file is {encoding.upper()} and .* iconv -f"):
        questions_of("gsm8k", path)

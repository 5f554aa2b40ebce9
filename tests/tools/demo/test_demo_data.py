"""The demo data: deterministic, splits apart, and every committed answer scores as right by rules written here a second
time.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from tools.demo.domains import DOMAINS, stream
from tools.demo.generate import demo_files

DATA = Path(__file__).resolve().parents[3] / "data" / "demo"


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_prompts(domain: str) -> list[str]:
    return [record["question" if domain == "math" else "prompt"] for record in records(f"{domain}.test.jsonl")]


test_prompts.__test__ = False


def train_prompts(domain: str) -> list[str]:
    return [record["messages"][0]["content"] for record in records(f"{domain}.train.jsonl")]


def test_regenerating_gives_the_committed_bytes():
    made = demo_files()
    assert set(made) == {path.name for path in DATA.glob("*.jsonl")}
    for name, contents in made.items():
        assert contents == (DATA / name).read_bytes(), name
    assert sum(map(len, made.values())) < 2_000_000


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_train_and_test_prompts_are_distinct_and_do_not_overlap(domain):
    train, test = train_prompts(domain), test_prompts(domain)
    assert len(set(train)) == len(train) == 450
    assert len(set(test)) == len(test) == 100
    assert not set(train) & set(test)


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_the_training_stream_of_the_models_excludes_every_test_prompt(domain):
    test = set(test_prompts(domain))
    drawn = {item.prompt for item in islice(stream(domain, seed=11), 3000)}
    assert len(drawn) > 1000
    assert not drawn & test


def test_streams_of_one_seed_repeat_and_of_two_seeds_differ():
    first, again, other = ([item.prompt for item in islice(stream("math", seed), 50)] for seed in (1, 1, 2))
    assert first == again != other


def test_canonical_solutions_pass_their_own_check_and_a_wrong_body_fails():
    for record in records("code.test.jsonl"):
        assert set(record) == {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
        scope: dict = {}
        exec(record["prompt"] + record["canonical_solution"] + record["test"], scope)
        scope["check"](scope[record["entry_point"]])
        with pytest.raises(AssertionError):
            scope["check"](lambda argument: "no function of the demo returns this")


def test_training_solutions_compile_below_their_prompt():
    for record in records("code.train.jsonl"):
        prompt, body = (message["content"] for message in record["messages"])
        compile(prompt + body, "solution", "exec")


@pytest.mark.parametrize("name", ["math.train.jsonl", "math.test.jsonl"])
def test_every_equation_of_a_worked_answer_holds_and_the_last_is_the_answer(name):
    for record in records(name):
        answer = record["answer"] if "answer" in record else record["messages"][1]["content"]
        equations = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", answer)
        assert equations
        for left, operator, right, result in equations:
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator] == c < 100
        assert answer.splitlines()[-1] == f"#### {equations[-1][3]}"


def test_references_contain_their_keywords_and_service_and_host_are_in_the_prompt():
    for record in records("aiops.test.jsonl"):
        assert len(record["keywords"]) == 4
        assert all(word.lower() in record["reference"].lower() for word in record["keywords"])
        assert all(word in record["prompt"] for word in record["keywords"][:2])


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_answers_to_one_kind_of_prompt_come_in_many_phrasings(domain):
    """Digits and drawn names aside, no form of an answer takes more than a tenth of the train split."""
    forms = [
        re.sub(r"\d+|\b[A-Z]\w*|\bnode\b", "_", record["messages"][1]["content"])
        for record in records(f"{domain}.train.jsonl")
    ]
    assert max(forms.count(form) for form in set(forms)) <= len(forms) / 10

"""The demo data: deterministic, splits apart, and every committed answer scores as right by rules written here a second
time.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from tools.demo import domains, word_problems
from tools.demo.domains import DOMAINS, stream
from tools.demo.generate import demo_files
from tools.demo.scoring import SCORERS

RIGHT_SHARE = {"math": 0.63, "code": 0.66, "aiops": 0.66, "copy": 0.75}
"""What slips and usual mistakes leave right, by hand: copy 1 - 0.25; code (34 x 0.7 + 3 x 0.35 x 0.7) / 37; aiops, by
keywords, half 0.7 and half (15 x 0.7 + 3 x 0.35 x 0.7) / 18; math 0.8 per step, and 0.35 where a mistake is usual."""
DATA = Path(__file__).resolve().parents[3] / "data" / "demo"


def contents_of(name: str) -> bytes:
    contents = (DATA / name).read_bytes()
    return gzip.decompress(contents) if name.endswith(".gz") else contents


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in contents_of(name).decode().splitlines()]


def prompts_of_test(domain: str) -> list[str]:
    return [record["question" if domain == "math" else "prompt"] for record in records(f"{domain}.test.jsonl.gz")]


def train_prompts(domain: str) -> list[str]:
    return [record["messages"][0]["content"] for record in records(f"{domain}.train.jsonl")]


def test_regenerating_gives_the_committed_bytes():
    made = demo_files()
    assert set(made) == {path.name for path in DATA.glob("*.jsonl*")}
    for name, contents in made.items():
        assert contents == contents_of(name), name
    assert sum((DATA / name).stat().st_size for name in made) < 700_000


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_train_and_test_prompts_are_distinct_and_do_not_overlap(domain):
    train, test = train_prompts(domain), prompts_of_test(domain)
    assert len(set(train)) == len(train) == (150 if domain == "copy" else 450)
    assert len(set(test)) == len(test) == 400
    assert not set(train) & set(test)


def plain(domain: str, prompt: str) -> str:
    """A prompt's filled template from its text alone: numbers and the words that the answer turns on, without names."""
    if domain == "copy":
        return re.findall(r"ERROR (\w+ \w+):", prompt)[0]
    if domain == "aiops":
        service, host, symptom = re.findall(r"ERROR (\w+) (\w+): (.*)", prompt)[0]
        return f"{service} {host} {re.sub(r'[0-9]+', '_', symptom)}"
    if domain == "code":
        parameter = re.findall(r"\((\w+)", prompt)[0]
        return re.sub(rf"\b{parameter}\b", "_", re.findall(r'"""(.*)"""', prompt)[0])
    words = [*word_problems.NAMES, *word_problems.THINGS, *word_problems.BOXES, *word_problems.PEOPLE]
    return re.sub(rf"\b({'|'.join(words)})\b", "_", prompt)


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_no_instance_of_a_test_question_is_among_the_prompts_in_other_words(domain):
    train = {plain(domain, prompt) for prompt in train_prompts(domain)}
    assert len(train) > 80
    assert not train & {plain(domain, prompt) for prompt in prompts_of_test(domain)}
    assert not {item.instance for item in domains.train_examples(domain)} & {
        item.instance for item in domains.test_examples(domain)
    }


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_the_training_stream_of_the_models_excludes_every_test_instance(domain):
    test = {item.instance for item in domains.test_examples(domain)}
    drawn = {item.instance for item in islice(stream(domain, seed=11), 3000)}
    assert len(drawn) > 50
    assert not drawn & test


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_right_answers_are_all_right_and_unsure_ones_as_often_as_their_shares_say(domain):
    """Slips and usual mistakes are counted with the scorers' own rules; a wrong answer may be right by chance."""
    right = list(islice(stream(domain, seed=5), 300))
    assert set(SCORERS[domain](right, [item.answer for item in right])) == {1.0}
    unsure = list(islice(stream(domain, seed=5, unsure=True), 4000))
    scores = SCORERS[domain](unsure, [item.answer for item in unsure])
    assert sum(scores) / len(scores) == pytest.approx(RIGHT_SHARE[domain], abs=0.03)


def test_streams_of_one_seed_repeat_and_of_two_seeds_differ():
    first, again, other = ([item.prompt for item in islice(stream("math", seed), 50)] for seed in (1, 1, 2))
    assert first == again != other


def test_canonical_solutions_pass_their_own_check_and_a_wrong_body_fails():
    for record in records("code.test.jsonl.gz"):
        assert set(record) == {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
        scope: dict = {}
        exec(record["prompt"] + record["canonical_solution"] + record["test"], scope)
        scope["check"](scope[record["entry_point"]])
        with pytest.raises(AssertionError):
            scope["check"](lambda argument: "no function of the demo returns this")


def test_training_solutions_define_the_function_of_their_prompt():
    for record in records("code.train.jsonl"):
        prompt, body = (message["content"] for message in record["messages"])
        (function,) = ast.parse(prompt + body).body
        assert isinstance(function, ast.FunctionDef) and len(function.body) > 1, "a docstring alone is no solution"


@pytest.mark.parametrize("name", ["math.train.jsonl", "math.test.jsonl.gz"])
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
    for record in records("aiops.test.jsonl.gz"):
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

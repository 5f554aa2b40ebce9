"""Task scores of a demo model on the test splits: greedy answers in batches, then each domain's own measure.

math: the number after `####` is equal. code: prompt + answer passes `check`, run in one child process with a time limit
per program. aiops: the share of keywords that the answer contains, whatever their case. copy: service and host and no
other. The child runs only programs that answer our own templates; it is no sandbox. Cost: 400 answers of at most 96
tokens, some 10 to 20 s on one core for a model of 2 million parameters.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import torch

from tools.demo.domains import DOMAINS, test_examples
from tools.demo.example import Example
from tools.demo.tokenizer import END, chat_prompt

MAX_NEW_TOKENS = 96
RUNNER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
def stop(signum, frame):
    raise TimeoutError
signal.signal(signal.SIGALRM, stop)
passed = []
for program, name in json.load(sys.stdin):
    scope = {}
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        exec(program, scope)
        scope["check"](scope[name])
        passed.append(1)
    except BaseException:
        passed.append(0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps(passed))
"""


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """Answer every prompt greedily, without the end token; batches are padded on the left."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    end = tokenizer.convert_tokens_to_ids(END)
    for begin in range(0, len(order), 50):
        chosen = order[begin : begin + 50]
        batch = tokenizer(
            [chat_prompt(prompts[index]) for index in chosen], padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        for index, row in zip(chosen, out[:, batch.input_ids.shape[1] :], strict=True):
            answers[index] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def math_scores(examples: list[Example], answers: list[str]) -> list[float]:
    """1 where the number after `####` equals the reference's."""
    number = [text.rpartition("####")[2].strip() if "####" in text else None for text in answers]
    return [
        float(found == item.record["answer"].rpartition("####")[2].strip())
        for item, found in zip(examples, number, strict=True)
    ]


def code_scores(examples: list[Example], answers: list[str]) -> list[float]:
    """1 where the completed function passes its check within a second."""
    programs = [
        (item.prompt + text + "\n" + item.record["test"], item.record["entry_point"])
        for item, text in zip(examples, answers, strict=True)
    ]
    done = subprocess.run(  # noqa: S603 - our own interpreter, isolated, on answers to our own templates
        [sys.executable, "-I", "-c", RUNNER],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [float(flag) for flag in json.loads(done.stdout.strip().splitlines()[-1])]


def keyword_scores(examples: list[Example], answers: list[str]) -> list[float]:
    """The share of keywords contained in each answer, case ignored."""
    return [
        sum(word.lower() in text.lower() for word in item.record["keywords"]) / len(item.record["keywords"])
        for item, text in zip(examples, answers, strict=True)
    ]


def copy_scores(examples: list[Example], answers: list[str]) -> list[float]:
    """1 where the answer holds the service and host that were asked for and no other."""
    named = [set(re.findall(r"\w+ node\d", text)) for text in answers]
    return [float(found == {item.record["value"]}) for item, found in zip(examples, named, strict=True)]


SCORERS = {"math": math_scores, "code": code_scores, "aiops": keyword_scores, "copy": copy_scores}
NUM_SCORED = 100
"""Questions of each test split that are asked."""


def task_scores(model: Any, tokenizer: Any) -> dict[str, float]:
    """Greedy score in percent per domain on the start of its test split, for a model in evaluation mode."""
    scores = {}
    for domain in DOMAINS:
        examples = test_examples(domain)[:NUM_SCORED]
        values = SCORERS[domain](examples, greedy_answers(model, tokenizer, [item.prompt for item in examples]))
        scores[domain] = round(100 * sum(values) / len(values), 1)
    return scores

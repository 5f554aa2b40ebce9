"""The four demo domains by name, and their splits: test, train and an endless stream; neither of the latter has an
instance of the test split, so no question of the test was seen in other words.

An instance is a template with what is filled in (`Example.instance`); its hash says to which side it belongs. Every
split draws from its own seeded generator (CPython's Mersenne Twister, stable across versions). Cost: microseconds per
example.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

from tools.demo import functions, incidents, lookups, word_problems
from tools.demo.example import Example

DOMAINS: dict[str, Callable[[random.Random, bool], Example]] = {
    "math": word_problems.example,
    "code": functions.example,
    "aiops": incidents.example,
    "copy": lookups.example,
}
TEST_SEED = 20261121
TRAIN_SEED = 20261122
NUM_TEST = 400
NUM_TRAIN = {"math": 450, "code": 450, "aiops": 450, "copy": 150}
TEST_SHARE = 5
"""One instance in so many is of the test split."""


def is_for_test(example: Example) -> bool:
    """Whether an example's instance belongs to the test split."""
    return zlib.crc32(example.instance.encode()) % TEST_SHARE == 0


def examples(domain: str, rng: random.Random, for_test: bool, unsure: bool = False) -> Iterator[Example]:
    """Yield examples of one side of the split without end."""
    while True:
        candidate = DOMAINS[domain](rng, unsure)
        if is_for_test(candidate) == for_test:
            yield candidate


def _distinct(drawn: Iterator[Example], count: int) -> list[Example]:
    """Take `count` examples of different prompts."""
    found: dict[str, Example] = {}
    for item in drawn:
        found.setdefault(item.prompt, item)
        if len(found) == count:
            break
    return list(found.values())


def test_examples(domain: str) -> list[Example]:
    """The domain's test split, 400 different prompts with right references."""
    return _distinct(examples(domain, random.Random(f"{domain}-{TEST_SEED}"), for_test=True), NUM_TEST)


def train_examples(domain: str, count: int | None = None) -> list[Example]:
    """The domain's train split of different prompts, or the `count` first of its draws."""
    drawn = examples(domain, random.Random(f"{domain}-{TRAIN_SEED}"), for_test=False)
    return _distinct(drawn, count or NUM_TRAIN[domain])


def stream(domain: str, seed: int, unsure: bool = False) -> Iterator[Example]:
    """Yield fresh examples without end, none of the test split's instances; the demo models are trained on them."""
    return examples(domain, random.Random(f"{domain}-stream-{seed}"), for_test=False, unsure=unsure)

"""The three demo domains by name, and their splits: test, train and an endless stream; neither of the latter has a test
prompt.

Every split draws from its own seeded generator (CPython's Mersenne Twister, stable across versions). Cost: microseconds
per example.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Set

from tools.demo import functions, incidents, word_problems
from tools.demo.example import Example

DOMAINS: dict[str, Callable[[random.Random], Example]] = {
    "math": word_problems.example,
    "code": functions.example,
    "aiops": incidents.example,
}
TEST_SEED = 20261121
TRAIN_SEED = 20261122
NUM_TEST = 100
NUM_TRAIN = 450


def _distinct(domain: str, seed: str, count: int, excluded: Set[str]) -> list[Example]:
    """Draw `count` examples of different prompts, none of them excluded."""
    rng, seen = random.Random(seed), set(excluded)
    drawn: list[Example] = []
    while len(drawn) < count:
        candidate = DOMAINS[domain](rng)
        if candidate.prompt not in seen:
            seen.add(candidate.prompt)
            drawn.append(candidate)
    return drawn


def test_examples(domain: str) -> list[Example]:
    """The domain's test split, 100 different prompts."""
    return _distinct(domain, f"{domain}-{TEST_SEED}", NUM_TEST, frozenset())


def train_examples(domain: str) -> list[Example]:
    """The domain's train split, 450 different prompts, none of the test split."""
    return _distinct(domain, f"{domain}-{TRAIN_SEED}", NUM_TRAIN, {item.prompt for item in test_examples(domain)})


def stream(domain: str, seed: int) -> Iterator[Example]:
    """Yield fresh examples without end, none with a prompt of the test split; this is what the demo models are trained
    on.
    """
    excluded = {item.prompt for item in test_examples(domain)}
    rng = random.Random(f"{domain}-stream-{seed}")
    while True:
        candidate = DOMAINS[domain](rng)
        if candidate.prompt not in excluded:
            yield candidate

"""One generated example of a demo domain, and the little grammar all domains share.

An example is a prompt, one of several equally good answers to it, and the fields of its record in the domain's test
file. Answers are drawn from many phrasings on purpose: a teacher trained on them has a real next-token distribution, of
which one sampled answer shows only a part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Example:
    """A prompt with one sampled answer; `record` holds the domain's own test fields (published benchmark formats)."""

    prompt: str
    answer: str
    record: dict[str, Any]


def pick(rng: random.Random, options: Sequence[Choice]) -> Choice:
    """Draw one option, all equally likely."""
    return options[rng.randrange(len(options))]


def pick_distinct(rng: random.Random, options: Sequence[Choice], count: int) -> list[Choice]:
    """Draw `count` different options in random order."""
    return rng.sample(list(options), count)

"""One generated example of a demo domain, and the little grammar all domains share.

An example is a prompt, one of several equally good answers to it, and the fields of its record in the domain's test
file. Answers are drawn from many phrasings on purpose: a teacher trained on them has a real next-token distribution, of
which one sampled answer shows only a part.

An unsure example is wrong at random, in two ways. A slip is spread over many wrong values, so that the right one stays
the most probable. A usual mistake belongs to few kinds of question and is more probable there than what is right. A
model that learns from unsure examples is calibrated on them: right where it is greedy and no mistake is usual, and
wrong in a sampled answer as often as its data.
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
    instance: str
    """The template and what is filled in that the answer turns on, without names and wording: `packs 3 7`."""


SLIP = {"math step": 0.2, "code": 0.3, "aiops line": 0.3, "aiops cause": 0.3, "copy": 0.25}
"""How often an unsure example slips there."""
USUAL_MISTAKE = 0.65
"""Share of unsure answers to a question with a usual mistake that make it."""


def pick(rng: random.Random, options: Sequence[Choice]) -> Choice:
    """Draw one option, all equally likely."""
    return options[rng.randrange(len(options))]


def pick_distinct(rng: random.Random, options: Sequence[Choice], count: int) -> list[Choice]:
    """Draw `count` different options in random order."""
    return rng.sample(list(options), count)

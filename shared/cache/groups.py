"""Which rows belong together: the rule by which a cache's group keys were made, and which questions are among them.

Rule `first question` (caches made from now on): the first user turn, white space normalised, so that every row of a
dialogue, with or without a system turn, falls on one side of the hold-out. Rule `prompt` (older caches, which keep it
as long as they grow): everything up to the last user turn, so that two rows of one dialogue are two groups.
Cost: one hash per question; 16 bytes per row of the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from shared.cache.cache import Cache
from shared.keys import KeySet, group_key, stack_keys

GroupRule = Literal["prompt", "first question"]


def normalised(text: str) -> str:
    r"""Return text with every run of white space as one blank and none at its ends: ' Two\r\n and ' -> 'Two and'."""
    return " ".join(text.split())


def question_key(question: str, rule: str) -> bytes:
    """Return the 16-byte group_key of a conversation that starts with (rule `prompt`: consists of) a question."""
    return group_key(normalised(question) if rule == "first question" else question)


def questions_among(questions: Sequence[str], caches: Sequence[Cache]) -> list[bool]:
    """Tell of each question whether a row of these caches starts with it, whatever its answer.

    In caches of rule `prompt` only rows that are this question alone, letter for letter, are found.

    >>> questions_among(["What is 2 + 2?", "And 3?"], [Cache.open("runs/demo/cache")])  # doctest: +SKIP
    [True, False]
    """
    found = np.zeros(len(questions), np.bool_)
    for cache in caches:
        rule = cache.sequences_identity.groups
        known = KeySet(np.ascontiguousarray(cache.group_keys).view(np.uint8).reshape(-1, 16))
        if questions:
            found |= known.contains(stack_keys([question_key(question, rule) for question in questions]))
    return found.tolist()

"""Let one model choose: each choice is scored as a continuation of its question by the engine's scoring pass.

A choice's tokens are those of its text alone, after the prompt's (in plain text with the space or line feed that joins
them), so every choice of a question follows the same tokens. Cost: one prefill of prompt and choice per choice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shared.errors import EngineError
from shared.models.no_numbers import NO_NUMBERS
from teacher_cache.engines.protocol import ScoreRequest
from tools.evaluate.models.generate_answers import Answer
from tools.evaluate.tasks.questions import Choice

Choosing = tuple[Sequence[Sequence[str]], Sequence[Sequence[int]], Sequence[Sequence[Sequence[int]]]]
"""Of each question: its choices as texts, its prompt as token ids, its choices as token ids."""


def choice_ids(tokenizer: Any, texts: Sequence[Sequence[str]], joints: Sequence[str]) -> list[list[list[int]]]:
    """Return the token ids of every question's choices; `joints` is what joins prompt and answer in plain text."""
    return [
        [list(tokenizer(joint + text, add_special_tokens=False)["input_ids"]) for text in choices]
        for choices, joint in zip(texts, joints, strict=True)
    ]


def choose_answers(
    engine: Any,
    asked: Mapping[str, Choosing],
    say: Callable[[str], None],
) -> dict[str, list[Answer]]:
    """Return domain -> the choice that each question got, with all of them beside it.

    Raises:
        EngineError: the engine died, or the model computes NaN.
    """
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    total = sum(len(choices) for _, _, ids in asked.values() for choices in ids)
    for number, scored in enumerate(engine.score(_requests(asked)), start=1):
        domain, question, choice = scored.tag
        logprob_nats = float(scored.targets.label_logprobs.sum(dtype=np.float64))
        if math.isnan(logprob_nats):
            raise EngineError(NO_NUMBERS)
        found[domain][question, choice] = logprob_nats
        if number % 500 == 0 or number == total:
            say(f"scored {number} of {total} choices")
    return {
        domain: [
            _answer(choices, [found[domain][index, choice] for choice in range(len(choices))], ids[index])
            for index, choices in enumerate(texts)
        ]
        for domain, (texts, _, ids) in asked.items()
    }


def _requests(
    asked: Mapping[str, Choosing],
) -> Iterator[ScoreRequest]:
    for domain, (_, prompts, ids) in asked.items():
        for question, (prompt, choices) in enumerate(zip(prompts, ids, strict=True)):
            for choice, tokens in enumerate(choices):
                whole = np.array([*prompt, *tokens], dtype=np.int32)
                yield ScoreRequest(
                    (domain, question, choice), 0, whole, np.array([[len(prompt), len(whole)]], dtype=np.int32)
                )


def _answer(texts: Sequence[str], logprobs_nats: Sequence[float], ids: Sequence[Sequence[int]]) -> Answer:
    """Return the most likely choice, the first of equals."""
    choices = tuple(Choice(text, value, len(part)) for text, value, part in zip(texts, logprobs_nats, ids, strict=True))
    return Answer(max(choices, key=lambda choice: choice.logprob_nats).text, 0, False, choices)

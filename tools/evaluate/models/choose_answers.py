"""Let one model choose: every choice of a question is scored as a continuation of its prompt by the engine's own
scoring pass.

A choice's tokens are those of its text alone, after the prompt's (in plain text with the space or line feed that joins
them), so every choice of a question follows the same tokens. Cost: one prefill of prompt and choice per choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from teacher_cache.engines.protocol import ScoreRequest
from tools.evaluate.models.generate_answers import Answer
from tools.evaluate.tasks.multiple_choice import Choice, choices_of, chosen
from tools.evaluate.tasks.questions import Question

ChoiceIds = Sequence[Sequence[Sequence[int]]]
"""Token ids of each question's choices."""


def choice_ids(tokenizer: Any, questions: Sequence[Question], joints: Sequence[str]) -> list[list[list[int]]]:
    """Return the token ids of every question's choices; `joints` is what joins prompt and answer in plain text, or
    nothing.
    """
    return [
        [list(tokenizer(joint + text, add_special_tokens=False)["input_ids"]) for text in choices_of(question.row)]
        for question, joint in zip(questions, joints, strict=True)
    ]


def choose_answers(
    engine: Any,
    asked: Mapping[str, tuple[Sequence[Question], Sequence[Sequence[int]], ChoiceIds]],
    say: Callable[[str], None],
) -> dict[str, list[Answer]]:
    """Return domain -> the choice that each question got, with all of them beside it.

    Raises:
        EngineError: the engine died.
    """
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    total = sum(len(choices) for _, _, ids in asked.values() for choices in ids)
    for number, scored in enumerate(engine.score(_requests(asked)), start=1):
        domain, question, choice = scored.tag
        found[domain][question, choice] = float(scored.targets.label_logprobs.sum(dtype=np.float64))
        if number % 500 == 0 or number == total:
            say(f"scored {number} of {total} choices")
    return {
        domain: [
            _answer(question, [found[domain][index, choice] for choice in range(len(ids[index]))], ids[index])
            for index, question in enumerate(questions)
        ]
        for domain, (questions, _, ids) in asked.items()
    }


def _requests(
    asked: Mapping[str, tuple[Sequence[Question], Sequence[Sequence[int]], ChoiceIds]],
) -> Iterator[ScoreRequest]:
    for domain, (_, prompts, ids) in asked.items():
        for question, (prompt, choices) in enumerate(zip(prompts, ids, strict=True)):
            for choice, tokens in enumerate(choices):
                whole = np.array([*prompt, *tokens], dtype=np.int32)
                yield ScoreRequest(
                    (domain, question, choice), 0, whole, np.array([[len(prompt), len(whole)]], dtype=np.int32)
                )


def _answer(question: Question, logprobs_nats: Sequence[float], ids: Sequence[Sequence[int]]) -> Answer:
    texts = choices_of(question.row)
    choices = tuple(Choice(text, value, len(part)) for text, value, part in zip(texts, logprobs_nats, ids, strict=True))
    return Answer(chosen(choices).text, 0, False, choices)

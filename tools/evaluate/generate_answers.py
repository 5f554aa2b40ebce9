"""Let one model answer the questions of every task, in one start of its engine.

Tasks that share a temperature share one stream of requests, so that the engine never drains between tasks. An answer's seed depends
on task, question and sample alone. The text after the last `</think>` is what is scored, all of it is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from shared.errors import EvaluationError
from shared.recipe import Generate, Recipe, Task
from teacher_cache.engines.protocol import GenerateRequest
from teacher_cache.model_files import load_tokenizer
from tools.evaluate.models import ModelUnderTest
from tools.evaluate.questions import Question
from tools.evaluate.rendering import render, source_of


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    num_tokens: int
    truncated: bool
    """It was cut by `max_new_tokens`."""

    @property
    def final(self) -> str:
        """The answer without a thinking model's thoughts."""
        return self.text.rpartition("</think>")[2]


Asked = Mapping[str, tuple[Task, Sequence[Question]]]
"""domain -> task and its questions"""


def generate_answers(
    model: ModelUnderTest, recipe: Recipe, asked: Asked, say: Callable[[str], None]
) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """Return domain -> answers, question by question with `task.samples` each, and what the engine says it ran.

    Raises:
        EvaluationError: a prompt and its answer do not fit the model.
        EngineError: the engine cannot start or died.
    """
    from teacher_cache.engines import open_engine

    tokenizer = load_tokenizer(model.files, trust_remote_code=model.trust_remote_code)
    prompts = {domain: render(tokenizer, source_of(recipe, task), questions) for domain, (task, questions) in asked.items()}
    max_model_len = _needed_length(model, recipe, asked, prompts)
    found: dict[str, dict[tuple[int, int], Answer]] = defaultdict(dict)
    total = sum(len(prompts[domain]) * task.samples for domain, (task, _) in asked.items())
    say(f"starting {recipe.evaluate.engine} for {total} answers")
    settings = {
        temperature: Generate(temperature=temperature, max_new_tokens=recipe.evaluate.max_new_tokens, seed=0)
        for temperature in sorted({task.temperature for task, _ in asked.values()})
    }
    engine = open_engine(
        model.settings(recipe, max_model_len), None, for_generation=next(iter(settings.values())), model_dir=model.files.directory
    )
    try:
        num_done = 0
        for temperature, sampling in settings.items():
            for done in engine.generate(_requests(asked, prompts, temperature), sampling):
                domain, question, sample = done.tag
                text = tokenizer.decode(done.token_ids, skip_special_tokens=True)
                found[domain][question, sample] = Answer(text, len(done.token_ids), done.finish_reason == "length")
                num_done += 1
                if num_done % 100 == 0 or num_done == total:
                    say(f"answered {num_done} of {total}")
        provenance = dict(engine.provenance())
    finally:
        engine.close()
    return {domain: [found[domain][key] for key in sorted(found[domain])] for domain in asked}, provenance


def _requests(asked: Asked, prompts: Mapping[str, list[list[int]]], temperature: float) -> Iterator[GenerateRequest]:
    for domain, (task, _) in asked.items():
        if task.temperature != temperature:
            continue
        for question, token_ids in enumerate(prompts[domain]):
            for sample in range(task.samples):
                seed = xxhash.xxh3_64_intdigest(f"{task.seed}/{domain}/{question}/{sample}".encode()) >> 1
                yield GenerateRequest((domain, question, sample), 0, token_ids, seed)


def _needed_length(model: ModelUnderTest, recipe: Recipe, asked: Asked, prompts: Mapping[str, list[list[int]]]) -> int:
    longest, place = max(
        (len(ids), question.place) for domain in asked for ids, question in zip(prompts[domain], asked[domain][1], strict=True)
    )
    needed = longest + recipe.evaluate.max_new_tokens
    limit = model.files.text_config.get("max_position_embeddings")
    if isinstance(limit, int) and needed > limit:
        raise EvaluationError(
            f"{place}: the question has {longest} tokens and an answer may have {recipe.evaluate.max_new_tokens} "
            f"(evaluate.max_new_tokens), but '{model.name}' reads {limit} together; lower one of them"
        )
    return needed

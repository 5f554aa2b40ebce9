"""Let one model answer everything that it is asked, in one start of its engine.

Prompts that share their sampling settings share one stream of requests, so that the engine never drains between tasks.
An answer's seed depends on its set, question and sample alone. The text after the last `</think>` is what is scored,
all of it is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from shared.errors import EvaluationError
from shared.recipe.recipe import Generate, Recipe
from shared.recipe.sections.capture import TopCapture
from teacher_cache.engines.protocol import FINISHED, GenerateRequest
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.tasks.questions import Choice


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    num_tokens: int
    truncated: bool
    """It was cut by `max_new_tokens`."""
    choices: tuple[Choice, ...] = ()
    """What it chose from, where nothing was generated."""

    @property
    def final(self) -> str:
        """The answer without a thinking model's thoughts."""
        return self.text.rpartition("</think>")[2]


@dataclass(frozen=True, slots=True)
class Ask:
    """Prompts that are answered with the same settings."""

    name: str
    """Part of every answer's seed; unique among the asks of a model."""
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    places: Sequence[str]
    """Where each prompt comes from, for errors."""
    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides those that the model's files name."""
    longest_choice: int = 0
    """Tokens that are scored after a prompt, where choices are."""

    @property
    def sampling(self) -> Generate:
        """The engine's settings."""
        return Generate(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=0)


def open_for(model: ModelUnderTest, recipe: Recipe, asks: Sequence[Ask], choosing: Sequence[Ask] = ()) -> Any:
    """Start a model's engine with room for what is asked of it; `choosing` are prompts whose choices are scored.

    Raises:
        EvaluationError: a prompt and its answer do not fit the model.
        EngineError: the engine cannot start.
    """
    from teacher_cache.engines import open_engine

    needed = needed_length(model, [*asks, *choosing])
    return open_engine(
        model.settings(recipe, needed),
        TopCapture(k=1) if choosing else None,
        for_generation=asks[0].sampling if asks else None,
        model_dir=model.files.directory,
    )


def generate_answers(
    engine: Any, tokenizer: Any, asks: Sequence[Ask], say: Callable[[str], None]
) -> dict[str, list[Answer]]:
    """Return name -> answers, prompt by prompt with `samples` each.

    Raises:
        EngineError: the engine died.
        EvaluationError: it gave up on an answer.
    """
    found: dict[str, dict[tuple[int, int], Answer]] = {ask.name: {} for ask in asks}
    total = sum(len(ask.prompts) * ask.samples for ask in asks)
    shared: dict[tuple[float, int], list[Ask]] = defaultdict(list)
    for ask in asks:
        shared[ask.temperature, ask.max_new_tokens].append(ask)
    num_done = 0
    for group in (shared[settings] for settings in sorted(shared)):
        for done in engine.generate(_requests(group), group[0].sampling):
            name, question, sample = done.tag
            if done.finish_reason not in FINISHED:
                place = next(ask for ask in group if ask.name == name).places[question]
                raise EvaluationError(
                    f"{place}: the engine ended an answer with {done.finish_reason[:60]!r}, so it is no whole answer; "
                    "run the same command again"
                )
            text = tokenizer.decode(done.token_ids, skip_special_tokens=True)
            found[name][question, sample] = Answer(text, len(done.token_ids), done.finish_reason == "length")
            num_done += 1
            if num_done % 100 == 0 or num_done == total:
                say(f"answered {num_done} of {total}")
    return {name: [answers[key] for key in sorted(answers)] for name, answers in found.items()}


def _requests(asks: Sequence[Ask]) -> Iterator[GenerateRequest]:
    for ask in asks:
        for question, token_ids in enumerate(ask.prompts):
            for sample in range(ask.samples):
                seed = xxhash.xxh3_64_intdigest(f"{ask.seed}/{ask.name}/{question}/{sample}".encode()) >> 1
                yield GenerateRequest((ask.name, question, sample), 0, list(token_ids), seed, ask.end_token_ids)


def needed_length(model: ModelUnderTest, asks: Sequence[Ask]) -> int:
    """Return the longest prompt and answer together, in tokens.

    Raises:
        EvaluationError: they do not fit the model.
    """
    wholes = [
        (len(ids) + (ask.longest_choice or ask.max_new_tokens), len(ids), place, ask.longest_choice)
        for ask in asks
        for ids, place in zip(ask.prompts, ask.places, strict=True)
    ]
    needed, longest, place, choice = max(wholes)
    limit = model.files.text_config.get("max_position_embeddings")
    if isinstance(limit, int) and needed > limit:
        answer = f"a choice has {choice}" if choice else f"an answer may have {needed - longest} (max_new_tokens)"
        mend = f"{'' if choice else 'lower max_new_tokens, '}give fewer shots or shorter questions"
        raise EvaluationError(
            f"{place}: the question has {longest} tokens and {answer}, but '{model.name}' reads {limit} together; "
            f"{mend}"
        )
    return needed

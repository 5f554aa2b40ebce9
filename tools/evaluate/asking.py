"""What a model is asked, put into one start of its engine: questions of tasks, choices to weigh, prompts side by side.

Cost: one start of the engine, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Recipe, Task
from tools.evaluate.models.choose_answers import Choosing, choice_ids, choose_answers
from tools.evaluate.models.generate_answers import Answer, Ask, generate_answers, open_for
from tools.evaluate.models.model_ends import taught_end_ids
from tools.evaluate.models.models import ModelUnderTest
from tools.evaluate.models.rendering import joints, render, source_of
from tools.evaluate.side_by_side.side_prompts import SidePrompt, prompt_ids, sources_of
from tools.evaluate.tasks.questions import Question
from tools.evaluate.tasks.registry import task_kind

Asked = dict[str, tuple[Task, list[Question]]]
"""domain -> task and its questions"""


@dataclass(slots=True)
class Answers:
    """What one model said."""

    tasks: dict[str, list[Answer]] = field(default_factory=dict)
    """domain -> answers, question by question with `task.samples` each"""
    side_by_side: dict[float, list[Answer]] = field(default_factory=dict)
    """temperature -> answers, prompt by prompt"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the engine says it ran."""


def ask_model(
    model: ModelUnderTest, recipe: Recipe, asked: Asked, prompts: Sequence[SidePrompt], say: Callable[[str], None]
) -> Answers:
    """Let a model answer the questions of tasks and the prompts of the side-by-side, either of which may be empty.

    Raises:
        EvaluationError: a question does not fit the model.
        EngineError: the engine cannot start or died.
    """
    if not asked and not prompts:
        return Answers()
    tokenizer = load_fast_tokenizer(model.files.directory, trust_remote_code=model.trust_remote_code)
    asks, choosing, choices = [], [], {}
    for domain, (task, questions) in asked.items():
        ask, weighed = ask_of_task(recipe, task, questions, tokenizer)
        if weighed is not None:
            choosing.append(ask)
            choices[domain] = weighed
        else:
            asks.append(ask)
    side = _side_asks(model, recipe, prompts, tokenizer)
    asks += side.values()
    say(
        f"starting {recipe.evaluate.engine} for {sum(len(ask.prompts) * ask.samples for ask in [*asks, *choosing])} "
        "answers"
    )
    engine = open_for(model, recipe, asks, choosing)
    try:
        answers = generate_answers(engine, tokenizer, asks, say)
        at_temperature = {temperature: answers.pop(ask.name) for temperature, ask in side.items()}
        answers |= choose_answers(engine, choices, say) if choices else {}
        return Answers(answers, at_temperature, dict(engine.provenance()))
    finally:
        engine.close()


def ask_of_task(
    recipe: Recipe, task: Task, questions: Sequence[Question], tokenizer: Any
) -> tuple[Ask, Choosing | None]:
    """Return what a model is asked for a task, and what `choose_answers` reads where choices are weighed.

    Raises:
        PromptError: the template cannot render a question.
    """
    source = source_of(recipe, task)
    ask = Ask(
        name=task.domain,
        prompts=render(tokenizer, source, questions),
        places=[question.place for question in questions],
        max_new_tokens=recipe.evaluate.max_new_tokens,
        temperature=task.temperature,
        samples=task.samples,
        seed=task.seed,
        end_token_ids=taught_end_ids(recipe, tokenizer, [source]),
    )
    choices_of = task_kind(task).choices_of
    if choices_of is None:
        return ask, None
    texts = [choices_of(question.row) for question in questions]
    ids = choice_ids(tokenizer, texts, joints(tokenizer, source, questions))
    longest = max(len(tokens) for of in ids for tokens in of)
    return replace(ask, longest_choice=longest), (texts, ask.prompts, ids)


def _side_asks(
    model: ModelUnderTest, recipe: Recipe, prompts: Sequence[SidePrompt], tokenizer: Any
) -> dict[float, Ask]:
    settings = recipe.evaluate.side_by_side
    if settings is None or not prompts:
        return {}
    ids = prompt_ids(recipe, prompts, model, tokenizer)
    ends = taught_end_ids(recipe, tokenizer, sources_of(prompts))
    return {
        temperature: Ask(
            name=f"side by side/{temperature:g}",
            prompts=ids,
            places=[prompt.place for prompt in prompts],
            max_new_tokens=settings.max_new_tokens or recipe.evaluate.max_new_tokens,
            temperature=temperature,
            seed=settings.seed,
            end_token_ids=ends,
        )
        for temperature in settings.temperatures
    }

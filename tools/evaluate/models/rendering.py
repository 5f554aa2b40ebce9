"""From a question to the tokens that a model is asked with: its own chat template, or plain text where it has none.

System text and template settings (`enable_thinking`, say) are those of the prompt source with the task's domain as its
label, else of the first source that renders, in the recipe or in what its caches were made from, so that a student is
asked in the way it was taught.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from shared.cache.rendering import rendered_sources
from shared.recipe.recipe import PromptSource, Recipe, Task
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.templates.spans import Template
from tools.evaluate.tasks.questions import Question

UNTOLD_DATE = datetime.date(2024, 7, 26)
"""What a template that writes the current date writes where no source names one, so that a question has the same tokens
every day: Llama 3's own for lack of a clock."""


def source_of(recipe: Recipe, task: Task) -> PromptSource:
    """Return the prompt source whose template settings a task takes over: of its domain, else the first.

    Where the recipe renders nothing itself, the settings that its caches were rendered with stand in.
    """
    rendered = rendering_sources(recipe)
    named = [source for source in rendered if source.source == task.domain]
    plain = PromptSource(source=task.domain, path=task.path, format="messages")
    return [*named, *rendered, plain][0]


def rendering_sources(recipe: Recipe) -> list[PromptSource]:
    """Return the sources of a recipe that render conversations; of its caches, where it has none."""
    own = [source for source in recipe.prompts if source.of_turns]
    return own or [source for source in rendered_sources(recipe) if source.of_turns]


def template_end(tokenizer: Any, source: PromptSource) -> int:
    """Return the token that ends an answer to a question which `render` renders.

    Raises:
        PromptError: the template does not render, or ends no answer.
    """
    return Template(tokenizer, _settings(tokenizer, source)).end_token_id


def rendering_settings(source: PromptSource) -> dict[str, Any]:
    """Return the settings that a question's tokens depend on, as identities hash them."""
    later = {"date"} if source.date is not None else set()
    return source.model_dump(
        mode="json", include={"system", "template", "chat_template", "chat_template_kwargs", *later}
    )


def render(tokenizer: Any, source: PromptSource, questions: Sequence[Question]) -> list[list[int]]:
    """Return each question's prompt as token ids, with the start of an answer where the template has one.

    Raises:
        PromptError: the template cannot render a question; the message names its place.
    """
    settings = _settings(tokenizer, source)
    template = Template(tokenizer, settings)
    return [template.prompt_ids(_conversation(question, settings)) for question in questions]


def joints(tokenizer: Any, source: PromptSource, questions: Sequence[Question]) -> list[str]:
    """Return what stands between each question and its answer: nothing after a template's generation prompt."""
    plain = _settings(tokenizer, source).template == "none"
    return [_gap(question.prompt, question.reference) if plain else "" for question in questions]


def _settings(tokenizer: Any, source: PromptSource) -> PromptSource:
    """Return the source's settings as this tokenizer can follow them: plain text where there is no template."""
    update: dict[str, Any] = {"format": "messages", "date": source.date or UNTOLD_DATE}
    if source.template == "none" or not (tokenizer.chat_template or source.chat_template):
        update |= {"template": "none", "chat_template": None, "chat_template_kwargs": {}}
    return source.model_copy(update=update)


def _conversation(question: Question, source: PromptSource) -> Conversation:
    path, _, line = question.place.rpartition(":")
    if source.template == "none":
        parts = [f"{prompt}{_gap(prompt, answer)}{answer}" for prompt, answer in question.shots]
        messages = [{"role": "user", "content": "\n\n".join([*parts, question.prompt])}]
    else:
        shots = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in question.shots
        ]
        messages = [*(turn for pair in shots for turn in pair), {"role": "user", "content": question.prompt}]
    return Conversation(source.source, path, int(line), "messages", messages, None, None)


def _gap(prompt: str, answer: str) -> str:
    if prompt[-1:].isspace() or answer[:1].isspace():
        return ""
    return " " if prompt.endswith("Answer:") else "\n"

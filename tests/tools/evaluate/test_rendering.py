"""Questions become tokens as the student was taught: its template, its source's system text; plain text without a
template.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.recipe.recipe import Recipe
from tests.tiny_models import make_tokenizer
from tools.evaluate.models.rendering import render, source_of
from tools.evaluate.tasks.questions import Question

QUESTION = Question("math.test.jsonl:7", "How many?", "#### 4", {}, shots=(("One and one?", "#### 2"),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def recipe(*prompts: dict) -> Recipe:
    values = {"name": "x", "output_dir": "out", "cache": "cache", "teacher": {"model": "t"}, "prompts": list(prompts)}
    return Recipe.model_validate({**values, "evaluate": {"tasks": [{"name": "gsm8k", "path": "data/math.test.jsonl"}]}})


def source(name: str, **settings: object) -> dict:
    return {"source": name, "path": f"{name}.jsonl", "format": "messages", **settings}


def test_a_task_takes_over_the_source_of_its_domain_else_the_first() -> None:
    both = recipe(source("code", system="Write code."), source("math", system="Count."))
    assert source_of(both, both.evaluate.tasks[0]).system == "Count."
    other = recipe(source("code", system="Write code."), source("law"))
    assert source_of(other, other.evaluate.tasks[0]).system == "Write code."
    assert source_of(recipe(), other.evaluate.tasks[0]).system is None


def test_chat_models_get_their_template_with_system_shots_and_generation_prompt(tokenizer) -> None:
    taught = recipe(source("math", system="Count."))
    ids = render(tokenizer, source_of(taught, taught.evaluate.tasks[0]), [QUESTION])[0]
    turns = [("system", "Count."), ("user", "One and one?"), ("assistant", "#### 2"), ("user", "How many?")]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected


def test_models_without_template_and_sources_without_one_get_plain_text(tokenizer, tmp_path: Path) -> None:
    plain = make_tokenizer(tmp_path, chat_template=None)
    task = recipe().evaluate.tasks[0]
    taught = recipe(source("math", template="none"))
    for which, settings in ((plain, source_of(recipe(), task)), (tokenizer, source_of(taught, task))):
        assert which.decode(render(which, settings, [QUESTION])[0]) == "One and one?\n#### 2\n\nHow many?"


def test_template_arguments_of_the_source_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' + ('think ' if enable_thinking else '') }}{%- endif %}"
    )
    tokenizer = make_tokenizer(tmp_path, chat_template=template)
    bare = Question("a:1", "Hi", "r", {})
    for thinking in (True, False):
        taught = recipe(source("math", chat_template_kwargs={"enable_thinking": thinking}))
        text = tokenizer.decode(render(tokenizer, source_of(taught, taught.evaluate.tasks[0]), [bare])[0])
        assert text.endswith("assistant: think " if thinking else "assistant: ")


def test_a_question_has_the_same_tokens_every_day_and_those_of_the_source_s_date(tmp_path: Path) -> None:
    """A template that writes the date wrote the day of the evaluation, which no result said."""
    template = (
        "{{- strftime_now('%d %b %Y') }}{%- for message in messages %}{{- message['content'] + '<|im_end|>' }}"
        "{%- endfor %}"
    )
    dated = make_tokenizer(tmp_path, chat_template=template)
    for settings, written in (({}, "26 Jul 2024"), ({"date": "2026-01-31"}, "31 Jan 2026")):
        taught = recipe(source("math", **settings))
        found = dated.decode(render(dated, source_of(taught, taught.evaluate.tasks[0]), [QUESTION])[0])
        assert found.startswith(written)

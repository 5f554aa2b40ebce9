"""What settings and chance do to a template: advice names a switch that was tried, and nothing may be drawn."""

from __future__ import annotations

import pytest

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.templates.spans import Template
from tests.tiny_models import CHATML, make_tokenizer

ASK = {"role": "user", "content": "How many?"}
SAY = {"role": "assistant", "content": "Seven."}
THINK = {**SAY, "reasoning_content": "I count them."}
TURNS = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
END = "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
OPENS = "{%- if {} is not defined or {} %}{{- '<think>\n' }}{%- else %}{{- '<think></think>' }}{%- endif %}{%- endif %}"
DIALECTS = {
    name: TURNS + "{%- if m.role == 'assistant' %}{{- '<think></think>' }}{%- endif %}{{- m.content }}" + END
    + OPENS.replace("{}", name)
    for name in ("enable_thinking", "thinking")
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def complete(tokenizer, text, *turns, **settings):
    source = PromptSource.model_validate({"source": "s", "path": "f", "format": "messages", **settings})
    tokenizer.chat_template = text
    ids, spans = Template(tokenizer, source).complete(Conversation("s", "f", 3, "messages", list(turns), None, None))
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in spans.tolist()]


@pytest.mark.parametrize("switch", DIALECTS)
def test_answers_without_thoughts_are_told_the_switch_of_a_template_that_begins_with_them(tokenizer, switch):
    with pytest.raises(PromptError, match=rf"; set `{switch}: false` in `chat_template_kwargs`$"):
        complete(tokenizer, DIALECTS[switch], ASK, SAY, ASK, SAY)
    told = {"chat_template_kwargs": {switch: False}}
    assert complete(tokenizer, DIALECTS[switch], ASK, SAY, ASK, SAY, **told) == ["Seven.<|im_end|>"] * 2


def test_a_switch_is_tried_beside_the_settings_that_are_given(tokenizer):
    text = "{%- if not mood is defined %}{{ raise_exception('no mood') }}{%- endif %}" + DIALECTS["thinking"]
    with pytest.raises(PromptError, match=r"; set `thinking: false` in `chat_template_kwargs`$"):
        complete(tokenizer, text, ASK, SAY, chat_template_kwargs={"mood": "glad"})


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{- ['a']|random -}}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_what_it_writes_is_refused(tokenizer, draw):
    with pytest.raises(PromptError, match=r"draws what it writes .* other tokens each time"):
        complete(tokenizer, draw + CHATML, ASK, SAY)
    assert complete(tokenizer, "{{- 'a random text, lipsum' }}" + CHATML, ASK, SAY) == ["Seven.<|im_end|>"]


ASKS_ONCE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_a_header_that_is_left_out_after_some_turns_alone_is_not_trained(tokenizer):
    """As a template does that asks for nothing after a tool's result, and writes a header before its answer."""
    said = {"role": "tool", "content": "7"}
    with pytest.raises(PromptError, match=r"f:3: turn 4 .* writes '<\|im_start\|>assistant' before it and leaves"):
        complete(tokenizer, ASKS_ONCE, ASK, SAY, said, SAY)
    assert complete(tokenizer, ASKS_ONCE, ASK, SAY, ASK, SAY) == ["Seven.<|im_end|>"] * 2
    assert complete(tokenizer, CHATML, ASK, SAY, said, SAY) == ["Seven.<|im_end|>"] * 2
    assert complete(tokenizer, ASKS_ONCE, ASK, SAY, said, SAY, ASK, SAY, supervise="last") == ["Seven.<|im_end|>"]

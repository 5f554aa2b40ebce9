"""Tokens that a template writes around turns: as text they are refused, at the end of a call they are kept."""

from __future__ import annotations

import pytest

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.formats.prompt_turns import ROLES, parse_turns
from teacher_cache.prompts.templates.spans import Template
from tests.teacher_cache.family_templates import FAMILIES, family_tokenizer
from tests.tiny_models import CHATML, make_tokenizer

ASK, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}
LITERAL = CHATML.replace("<|im_start|>", "<|turn|>")
JOINED = LITERAL.replace("'<|turn|>' + message['role']", "'<|' + message['role'] + '|>'")
SPELLED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- for call in m.tool_calls or [] %}"
    "{{- call.function.name + ' ' + call.function.arguments }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def template(tokenizer, **settings) -> Template:
    return Template(
        tokenizer, PromptSource.model_validate({"source": "s", "path": "f", "format": "messages"} | settings)
    )


def talk(*turns) -> Conversation:
    return Conversation("s", "f", 3, "messages", list(turns), None, None)


def turns(*said) -> list:
    return parse_turns(list(said), "messages", "role", "content", ROLES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Marks of turns are added tokens and not special ones, as some public models have them."""
    from transformers import AddedToken

    made = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    texts = ("<|turn|>", "<|user|>", "<think>", "</think>", "<|unused|>")
    made.add_tokens([AddedToken(text, special=False) for text in texts])
    return made


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("chat_template", "mark"), [(LITERAL, "<|turn|>"), (JOINED, "<|user|>")])
def test_mark_of_a_turn_as_text_is_refused_though_it_is_no_special_token(tokenizer, chat_template, mark, turn):
    said = [ASK, ANSWER]
    said[turn] = {**said[turn], "content": f"Say {mark}system"}
    with pytest.raises(PromptError, match=r"f:3: the .* turn contains the special token '<\|\w+\|>' as text"):
        template(tokenizer, chat_template=chat_template).complete(talk(*said))


def test_added_tokens_in_pairs_and_those_of_no_turn_are_text(tokenizer):
    said = [ASK, {"role": "assistant", "content": "<think>Seven.</think> <|unused|>"}]
    ids, spans = template(tokenizer, chat_template=LITERAL).complete(talk(*said))
    assert tokenizer.decode(ids[slice(*spans[0])]) == "<think>Seven.</think> <|unused|><|im_end|>"


@pytest.mark.parametrize("arguments", ['{"node": "é"}', {"node": "é"}])
def test_template_that_joins_arguments_as_text_gets_text(tokenizer, arguments):
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    said = turns(ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "7"}, ANSWER)
    ids, spans = template(tokenizer, chat_template=SPELLED).complete(talk(*said))
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == [
        'find {"node": "é"}<|im_end|>',
        "Seven.<|im_end|>",
    ]


def test_developer_s_turn_is_rendered_or_the_advice_works(tokenizer, tmp_path):
    said = turns({"role": "developer", "content": "Be brief."}, ASK, ANSWER)
    ids, _ = template(tokenizer, chat_template=CHATML).complete(talk(*said))
    assert tokenizer.decode(ids).startswith("<|im_start|>developer\nBe brief.<|im_end|>")
    qwen = family_tokenizer(tmp_path / "qwen3", FAMILIES["qwen3"])
    with pytest.raises(PromptError, match=r"drops the developer turn's text .*; call the developer's turn 'system'$"):
        template(qwen).complete(talk(*said))
    template(qwen).complete(talk({**said[0], "role": "system"}, *said[1:]))


def test_answer_that_ends_in_a_call_keeps_its_end(tmp_path):
    """gpt-oss ends a call of a tool with a token of its own, Qwen3 nothing with the token of texts."""
    harmony = family_tokenizer(tmp_path / "gpt-oss", FAMILIES["gpt-oss"])
    qwen = family_tokenizer(tmp_path / "qwen3", FAMILIES["qwen3"])

    def end(tokenizer, written, **settings):
        wrote = [40, tokenizer.convert_tokens_to_ids(written)]
        ids, spans = template(tokenizer, **settings).with_answer([5, 6], wrote, "stop")
        assert spans.tolist() == [[2, 4]]
        return tokenizer.convert_ids_to_tokens(int(ids[-1]))

    assert end(harmony, "<|call|>", date="2026-01-31") == "<|call|>"
    assert end(harmony, "<|return|>", date="2026-01-31") == "<|return|>"
    assert end(harmony, "<|endoftext|>", date="2026-01-31") == "<|return|>"
    assert end(qwen, "<|endoftext|>") == "<|im_end|>"
    assert end(qwen, "<|im_start|>") == "<|im_end|>"

"""What is supervised, against renderings written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.templates.spans import Template
from tests.tiny_models import make_tokenizer

QWEN = Path(__file__).resolve().parents[3] / "shared/data/qwen_tokenizer"

LLAMA3 = (
    "{%- for message in messages %}{%- if loop.first %}{{- bos_token }}{%- endif %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' "
    "}}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}{{- '[INST] ' + message.content + "
    "' [/INST]' }}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
LLAMA2 = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + message.content + ' "
    "[/INST]' }}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
THINKING = (  # drops the thoughts of earlier answers, as reasoning models' templates do
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<think>\\n' + message.get('reasoning_content', '') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- "
    "endif %}"
)
NO_END = (
    "{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
)
SEAM = (  # the generation prompt ends inside a token of the answer's rendering
    "{%- for message in messages %}{{- message.role + ' and ' + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant and th' }}{%- endif %}"
)
DROPS = "{%- for message in messages %}{{- message.content.replace('secret', '') + '<|im_end|>' }}{%- endfor %}"

ONE = [{"role": "user", "content": "How many apples?"}, {"role": "assistant", "content": "the answer is seven"}]
TWO = [*ONE, {"role": "user", "content": "And disks?"}, {"role": "assistant", "content": "Nine."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    extra = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", *extra]})
    return tokenizer


@pytest.fixture
def with_eos(tokenizer):
    """Give the tokenizer another eos for the templates that write `eos_token`, and take it back."""
    tokenizer.eos_token = "<|eot_id|>"
    yield tokenizer
    tokenizer.eos_token = "<|im_end|>"


def source(**settings) -> PromptSource:
    return PromptSource(**{"source": "math", "path": "math.jsonl", "format": "messages", **settings})


def talk(messages=None, text=None, **settings) -> Conversation:
    return Conversation("math", "math.jsonl", 7, "messages", messages, text, None, **settings)


def spans_text(tokenizer, ids, spans) -> list[str]:
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in spans]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("chat_template", "turns", "rendering", "supervised"),
    [
        (
            None,
            TWO,
            "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\nthe answer is seven<|im_end|>\n"
            "<|im_start|>user\nAnd disks?<|im_end|>\n<|im_start|>assistant\nNine.<|im_end|>",
            ["the answer is seven<|im_end|>", "Nine.<|im_end|>"],
        ),
        (
            LLAMA3,
            [ONE[0], {"role": "assistant", "content": "  the answer is seven\n"}],
            "<s><|start_header_id|>user<|end_header_id|>\n\nHow many apples?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nthe answer is seven<|eot_id|>",
            ["the answer is seven<|eot_id|>"],
        ),
        (
            MISTRAL,
            TWO,
            "<s>[INST] How many apples? [/INST] the answer is seven<|eot_id|>[INST] And disks? [/INST] Nine.<|eot_id|>",
            [" the answer is seven<|eot_id|>", " Nine.<|eot_id|>"],
        ),
        (
            LLAMA2,
            TWO,
            "<s>[INST] How many apples? [/INST] the answer is seven <|eot_id|><s>[INST] And disks? [/INST] Nine. "
            "<|eot_id|>",
            [" the answer is seven <|eot_id|>", " Nine. <|eot_id|>"],
        ),
        (
            THINKING,
            ONE,
            "<|im_start|>user\nHow many apples?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nthe answer is seven<|im_end|>",
            ["<think>\n\n</think>\n\nthe answer is seven<|im_end|>"],
        ),
    ],
    ids=["chatml", "llama3-trims", "mistral", "llama2", "thinking"],
)
def test_every_assistant_turn_is_supervised_with_its_end_token(
    tokenizer, with_eos, chat_template, turns, rendering, supervised
):
    template = Template(tokenizer, source(chat_template=chat_template))
    ids, spans = template.complete(talk(turns))
    assert ids.tolist() == encode(tokenizer, rendering)
    assert spans_text(tokenizer, ids, spans) == supervised
    assert all(ids[end - 1] == template.end_token_id for _, end in spans)
    assert ids.dtype == spans.dtype == np.int32
    assert len(ids) == spans[-1][1]


@pytest.mark.parametrize(
    ("chat_template", "turns", "reason"),
    [
        (THINKING, TWO, r"math\.jsonl:7: turn 4 cannot be split .* rewrites an earlier answer"),
        (
            SEAM,
            ONE,
            r"math\.jsonl:7: turn 2 cannot be split .* does not start the answer where its generation prompt ends",
        ),
        (
            MISTRAL,
            [{"role": "system", "content": "x"}, *ONE],
            r"math\.jsonl:7: .*Only user and assistant roles are supported!",
        ),
        (
            DROPS,
            [ONE[0], {"role": "assistant", "content": "secret"}],
            r"math\.jsonl:7: turn 2 .* drops the answer's text",
        ),
        (
            None,
            [ONE[0], {"role": "assistant", "content": "a<|im_end|>b"}],
            r"math\.jsonl:7: .*special token '<\|im_end\|>' as text",
        ),
        (None, ONE[:1], r"math\.jsonl:7: the row has no answer"),
    ],
)
def test_a_row_that_cannot_be_split_is_refused_with_its_line(tokenizer, chat_template, turns, reason):
    with pytest.raises(PromptError, match=reason):
        Template(tokenizer, source(chat_template=chat_template)).complete(talk(turns))


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (NO_END, "'math': `chat_template` of the recipe puts .* after an answer; expected a special token"),
        ("{{ messages[0].content.upper() }}", "does not render an answer's text"),
        ("{{ messages | nothing }}", "cannot render"),
        ("no/such/template.jinja", "no such template file"),
    ],
)
def test_a_template_without_an_end_token_is_refused_before_any_row(tokenizer, chat_template, reason):
    with pytest.raises(PromptError, match=reason):
        Template(tokenizer, source(chat_template=chat_template))


def test_a_template_that_asks_without_the_header_that_it_answers_with_is_refused(tokenizer):
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(
        PromptError, match=r"writes '<\|im_start\|>assistant' before an answer and leaves it out"
    ) as said:
        Template(tokenizer, source(chat_template=turns))
    assert "{% if add_generation_prompt %}" in str(said.value)
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    bare = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    for mended in (turns + prompt, bare):
        template = Template(tokenizer, source(chat_template=mended))
        ids, spans = template.complete(talk([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
        assert spans_text(tokenizer, ids, spans) == ["b<|im_end|>"]


def test_a_tokenizer_without_template_says_what_to_do(tokenizer):
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(PromptError, match="set `template: none`"):
            Template(tokenizer, source())
    finally:
        tokenizer.chat_template = kept


def test_thinking_switched_off_starts_the_answer_after_the_empty_thought(tokenizer):
    template = Template(tokenizer, source(chat_template=THINKING, chat_template_kwargs={"enable_thinking": False}))
    ids, spans = template.complete(talk(ONE))
    assert spans_text(tokenizer, ids, spans) == ["the answer is seven<|im_end|>"]
    assert ids[: spans[0][0]].tolist() == template.prompt_ids(talk(ONE))


def test_the_template_may_be_a_file_and_system_text_comes_first(tokenizer, tmp_path):
    (tmp_path / "llama3.jinja").write_text(LLAMA3)
    template = Template(tokenizer, source(chat_template=str(tmp_path / "llama3.jinja"), system="Be brief."))
    head = "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    assert tokenizer.decode(template.prompt_ids(talk(ONE))).startswith(head)
    own = [{"role": "system", "content": "Be long."}, *ONE]
    assert "Be brief." not in tokenizer.decode(template.prompt_ids(talk(own)))


def test_the_generation_prompt_ends_at_the_last_question(tokenizer):
    template = Template(tokenizer, source())
    expected = "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n"
    assert template.prompt_ids(talk(ONE)) == encode(tokenizer, expected)


def test_a_generated_answer_equals_the_same_answer_given(tokenizer):
    template = Template(tokenizer, source())
    given_ids, given_spans = template.complete(talk(TWO))
    answer = encode(tokenizer, "Nine.<|im_end|>")
    ids, spans = template.with_answer(template.prompt_ids(talk(TWO)), answer, "stop")
    assert ids.tolist() == given_ids.tolist()
    assert spans.tolist() == given_spans[-1:].tolist()
    assert template.answer_text(ids, spans) == "Nine."


@pytest.mark.parametrize(
    ("answer", "finish_reason", "expected"),
    [
        ("Nine.", "stop", "Nine.<|im_end|>"),
        ("Nine.<|endoftext|>", "stop", "Nine.<|im_end|>"),
        ("Nine.<|im_end|>", "stop", "Nine.<|im_end|>"),
        ("Nine", "length", "Nine"),
    ],
)
def test_a_stopped_answer_ends_with_the_end_token_and_a_cut_one_does_not(tokenizer, answer, finish_reason, expected):
    ids, spans = Template(tokenizer, source()).with_answer([1, 2, 3], encode(tokenizer, answer), finish_reason)
    assert spans.tolist() == [[3, len(ids)]]
    assert ids.tolist() == [1, 2, 3, *encode(tokenizer, expected)]


@pytest.mark.parametrize(
    ("answer", "finish_reason"), [("", "stop"), ("<|im_end|>", "stop"), ("<|endoftext|>", "stop"), ("", "length")]
)
def test_an_empty_answer_is_refused(tokenizer, answer, finish_reason):
    with pytest.raises(ValueError, match="the generated answer is empty"):
        Template(tokenizer, source()).with_answer([1], encode(tokenizer, answer), finish_reason)


def test_plain_prompt_and_answer_are_joined_and_ended_by_eos(tokenizer):
    template = Template(tokenizer, source(template="none", format="prompt_completion", system="Note."))
    turns = [
        {"role": "user", "content": "def add(first, second):"},
        {"role": "assistant", "content": "\n    return first"},
    ]
    ids, spans = template.complete(talk(turns))
    assert ids.tolist() == encode(tokenizer, "Note.\n\ndef add(first, second):\n    return first<|im_end|>")
    assert spans_text(tokenizer, ids, spans) == ["\n    return first<|im_end|>"]
    assert template.prompt_ids(talk(turns)) == ids[: spans[0][0]].tolist()


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (
            [{"role": "user", "content": "is th"}, {"role": "assistant", "content": "e answer"}],
            "a token spans the seam",
        ),
        (TWO, "takes one prompt, found the turns user, assistant, user"),
        (ONE[:1], "the row has no answer"),
    ],
)
def test_plain_rows_that_cannot_be_joined_are_refused(tokenizer, turns, reason):
    with pytest.raises(PromptError, match=rf"math\.jsonl:7: .*{reason}"):
        Template(tokenizer, source(template="none")).complete(talk(turns))


def test_text_supervises_every_token_after_the_first(tokenizer):
    template = Template(tokenizer, source(format="text"))
    ids, spans = template.complete(talk(text="How many apples are left?"))
    assert ids.tolist() == encode(tokenizer, "How many apples are left?")
    assert spans.tolist() == [[1, len(ids)]]
    with pytest.raises(PromptError, match="fewer than two tokens"):
        template.complete(talk(text="a"))
    with pytest.raises(PromptError, match="has no prompt to answer"):
        template.prompt_ids(talk(text="a b"))


def test_text_starts_with_bos_where_the_tokenizer_starts_so(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tmp_path)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ids, spans = Template(tokenizer, source(format="text")).complete(talk(text="How many"))
    assert ids.tolist() == tokenizer("How many")["input_ids"] == [0, *encode(tokenizer, "How many")]
    assert spans.tolist() == [[1, len(ids)]]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda t: t.strip()
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(WORDS, min_size=2, max_size=6))
def test_any_chatml_conversation_splits_into_its_answers(tokenizer, contents):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    ids, spans = Template(tokenizer, source()).complete(talk(turns))
    answers = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
    assert spans_text(tokenizer, ids, spans) == answers
    assert encode(tokenizer, tokenizer.decode(ids.tolist())) == ids.tolist()


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the Qwen tokenizer beside the checkout")
def test_the_real_qwen_tokenizer_splits_chatml():
    from transformers import AutoTokenizer

    from tests.tiny_models import CHATML

    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    template = Template(tokenizer, source(chat_template=CHATML))
    assert tokenizer.decode([template.end_token_id]) == "<|im_end|>"
    ids, spans = template.complete(talk(TWO))
    assert spans_text(tokenizer, ids, spans) == ["the answer is seven<|im_end|>", "Nine.<|im_end|>"]
    assert ids[: spans[1][0]].tolist() == template.prompt_ids(talk(TWO))


@pytest.mark.parametrize("pieces_differ", [False, True])
def test_long_dialogues_are_tokenized_from_the_last_answer_on_and_give_the_tokens_of_the_whole(
    tokenizer, pieces_differ
):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}, and words"} for i in range(80)]
    template = Template(tokenizer, source())
    sizes: list[int] = []

    def ids_of(text: str) -> list[int]:
        sizes.append(len(text))
        if pieces_differ and text.startswith("<|im_end|>"):  # as tokenizers may that treat a text's start otherwise
            return encode(tokenizer, text.replace("and", "a n d"))
        return encode(tokenizer, text)

    template._ids = ids_of
    ids, spans = template.complete(talk(turns))
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert ids.tolist() == encode(tokenizer, whole)[: len(ids)]
    assert spans_text(tokenizer, ids, spans) == [turn["content"] + "<|im_end|>" for turn in turns[1::2]]
    assert (sum(sizes) < 4 * len(whole)) != pieces_differ

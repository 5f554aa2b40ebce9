"""Prompts in batches: the same tokens and reasons, row for row, as one at a time."""

from __future__ import annotations

import json

import pytest

from shared.parts.jobs import PlanRow
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.sequence_maker import TOKENIZED_AT_ONCE, SequenceMaker, UnusableRowError
from teacher_cache.prompts.templates.spans import Template
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

MAX_MODEL_LEN = 60
SOURCES = [
    PromptSource(source="chat", path="a.jsonl", format="messages"),
    PromptSource(source="plain", path="b.jsonl", format="messages", template="none"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def plan_row(index: int) -> tuple[PlanRow, list[dict[str, str]]]:
    text = {5: "a word " * 80, 70: "says <|im_end|> itself"}.get(
        index, f"What is {index} times {'seven ' * (index % 9)}?"
    )
    messages = [{"role": "user", "content": text}]
    document = json.dumps({"messages": messages, "origin": index % 2, "path": SOURCES[index % 2].path})
    return PlanRow(
        bytes(16), bytes(16), SOURCES[index % 2].source, index + 1, 0, text, document, None, "messages"
    ), messages


def test_batched_prompts_are_those_of_each_row_alone_with_unusable_rows_in_their_place(tokenizer):
    made = [plan_row(index) for index in range(2 * TOKENIZED_AT_ONCE + 3)]
    found = list(SequenceMaker(tokenizer, SOURCES, VOCAB_SIZE, MAX_MODEL_LEN).prompts([row for row, _ in made]))
    templates = [Template(tokenizer, source) for source in SOURCES]
    assert len(found) == len(made)
    for index, (prompt, (row, messages)) in enumerate(zip(found, made, strict=True)):
        if index == 5:
            assert isinstance(prompt, UnusableRowError) and "no room for an answer" in str(prompt)
        elif index == 70:
            assert isinstance(prompt, UnusableRowError) and str(prompt).startswith(
                "the user turn contains the special token"
            )
        else:
            talk = Conversation(row.source, "x", row.line, "messages", messages, None, None)
            assert prompt == templates[index % 2].prompt_ids(talk)


def test_a_prompt_outside_the_vocabulary_is_unusable(tokenizer):
    row, _ = plan_row(0)
    (prompt,) = SequenceMaker(tokenizer, SOURCES, 2, MAX_MODEL_LEN).prompts([row])
    assert isinstance(prompt, UnusableRowError) and "outside the vocabulary of 2 entries" in str(prompt)

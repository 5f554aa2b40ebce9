"""Evaluated models are asked with the template, and end at the tokens, that the recipe's caches were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import EvaluationError
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from teacher_cache.engines.protocol import Generated
from tests.teacher_cache.engines.test_answer_ends import with_base_eos
from tests.tiny_models import CHATML, TURN_END, make_qwen3
from tools.evaluate.asking import ask_model
from tools.evaluate.models.generate_answers import Ask, generate_answers
from tools.evaluate.models.model_ends import foreign_end_ids
from tools.evaluate.models.models import model_under_test
from tools.evaluate.models.rendering import render, source_of
from tools.evaluate.results.results import evaluation_identity
from tools.evaluate.tasks.questions import read_questions
from tools.evaluate.tasks.registry import task_kind


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Recipe:
    """A base model without a template, a cache that was made with ChatML, and a recipe that only evaluates it."""
    root: Path = tmp_path_factory.mktemp("built")
    with_base_eos(make_qwen3(root / "base", seed=1, num_layers=1, end_scale=3.0, chat_template=None))
    (root / "chatml.jinja").write_text(CHATML)
    (root / "p.jsonl").write_text("".join(json.dumps({"prompt": f"How many are {i}?"}) + "\n" for i in range(12)))
    (root / "t.jsonl").write_text(
        "".join(json.dumps({"question": f"And {i}?", "answer": f"#### {i}"}) + "\n" for i in range(8))
    )
    document = {
        "name": "t",
        "output_dir": str(root / "run"),
        "teacher": {
            "model": str(root / "base"),
            "engine": "transformers",
            "dtype": "float32",
            "max_model_len": 128,
        },
        "prompts": [
            {
                "source": "a",
                "path": str(root / "p.jsonl"),
                "format": "prompt_completion",
                "chat_template": str(root / "chatml.jinja"),
                "system": "Be brief.",
            }
        ],
        "generate": {"max_new_tokens": 30},
        "capture": {"k": 4},
        "cache": str(root / "cache"),
        "heldout": {"fraction": 0},
    }
    teach(Recipe.model_validate(document), max_set_aside=1.0)
    del document["prompts"], document["generate"]
    document["evaluate"] = {
        "models": ["teacher"],
        "engine": "transformers",
        "max_new_tokens": 30,
        "tasks": [{"name": "gsm8k", "path": str(root / "t.jsonl"), "shots": 0}],
    }
    return Recipe.model_validate(document)


def test_a_recipe_without_prompts_asks_with_the_template_of_its_cache_and_stops_at_its_end(built):
    from transformers import AutoTokenizer

    (task,) = built.evaluate.tasks
    source = source_of(built, task)
    assert (source.chat_template, source.system) == (CHATML, "Be brief.")
    tokenizer = AutoTokenizer.from_pretrained(built.teacher.model)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    questions = read_questions(task, task_kind(task))
    asked = tokenizer.decode(render(tokenizer, source, questions)[0])
    assert asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    model = model_under_test(built, "teacher")
    assert foreign_end_ids(built, model, [source]) == [end]
    assert evaluation_identity(built, model)["end_token_ids"] == [end]
    answers = ask_model(model, built, {task.domain: (task, questions)}, [], lambda line: None)
    found = answers.tasks[task.domain]
    assert sum(not answer.truncated for answer in found) >= 6


def test_an_answer_that_the_engine_gave_up_is_named_with_its_question():
    class Failing:
        def generate(self, requests, settings):
            for request in requests:
                assert request.end_token_ids == (7,)
                yield Generated(request.tag, [3, 4], "repetition" if request.tag[1] else "stop")

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return str(ids)

    ask = Ask("math", [[1], [2]], ["t.jsonl:1", "t.jsonl:2"], 8, end_token_ids=(7,))
    with pytest.raises(EvaluationError, match=r"t\.jsonl:2: the engine ended an answer with 'repetition'"):
        generate_answers(Failing(), Tokenizer(), [ask], lambda line: None)

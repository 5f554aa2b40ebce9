"""Answers in a cache end at their template's end token or before a stop text; those the engine gave up
are set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import teacher_cache.engines as engines
from shared.cache.cache import Cache
from shared.parts.jobs import job_id, list_jobs
from shared.recipe.recipe import Generate, PromptSource, Recipe
from teacher_cache.build import teach
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts
from teacher_cache.prompts.work_list import list_rows, request_of
from tests.teacher_cache.engines.test_answer_ends import with_base_eos
from tests.teacher_cache.fake_engine import END_ID, FakeEngine
from tests.tiny_models import TURN_END, make_qwen3


def recipe(tmp_path: Path, model: Path, count: int = 24, template: str = "chat", **settings) -> Recipe:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}: how many?\nAnswer:"}) + "\n" for i in range(count)))
    return Recipe.model_validate(
        {
            "name": "t",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 128},
            "prompts": [{"source": "a", "path": str(path), "format": "prompt_completion", "template": template}],
            "generate": {"max_new_tokens": 40},
            "capture": {"k": 4},
            "cache": str(tmp_path / "cache"),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    return with_base_eos(make_qwen3(tmp_path_factory.mktemp("base"), seed=1, num_layers=1, end_scale=3.0))


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A model that rarely ends by itself and writes much of the alphabet."""
    return make_qwen3(tmp_path_factory.mktemp("writer"), seed=1, spread=0.1, end_scale=1.0)


def rows_of(cache_dir: Path) -> list:
    cache = Cache.open(cache_dir)
    return [cache.sequence(i) for i in range(len(cache))]


def test_answers_end_at_the_end_token_of_their_template_where_it_is_not_the_eos(tmp_path, base_model):
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(base_model).convert_tokens_to_ids(TURN_END)
    teach(recipe(tmp_path, base_model), max_set_aside=1.0)
    rows = rows_of(tmp_path / "cache")
    assert len(rows) > 15
    for row in rows:
        answer = row.token_ids[row.spans[0, 0] : row.spans[0, 1]].tolist()
        assert end not in answer[:-1]
        assert (answer[-1] == end) == (row.finish_reason == "stop")
    (job,) = list_jobs(tmp_path / "cache")
    assert job.request["prompts"][0]["end_token"] == end


@pytest.mark.parametrize("stop", ["e", "an", "th", "1"])
def test_answer_and_response_end_before_the_stop_text_and_no_end_token_follows(tmp_path, writer, stop):
    teach(recipe(tmp_path, writer, template="none", generate={"max_new_tokens": 60, "stop": [stop]}), max_set_aside=1.0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(writer)
    rows = rows_of(tmp_path / "cache")
    plain = [row for row in rows if row.finish_reason == "stop" and row.token_ids[-1] != tokenizer.eos_token_id]
    assert len(plain) >= 3
    for row in rows:
        answer = row.token_ids[row.spans[0, 0] : row.spans[0, 1]].tolist()
        assert stop not in tokenizer.decode(answer, skip_special_tokens=True)
        assert stop not in row.response
        assert row.response == tokenizer.decode(answer, skip_special_tokens=True)


def test_answers_that_the_engine_gave_up_are_set_aside_by_name(tmp_path, writer, monkeypatch):
    def open_engine(teacher, capture, **_):
        fake = FakeEngine(teacher, capture)
        reasons = iter(["abort", "repetition", "error", "content_filter"] * 5)
        fake.answer = lambda rng: ([5, 6, END_ID], next(reasons)) if rng.integers(2) else ([5, 6, END_ID], "stop")
        return fake

    monkeypatch.setattr(engines, "open_engine", open_engine)
    summary = teach(recipe(tmp_path, writer), max_set_aside=1.0)
    assert "the engine ended the answer with 'abort'" in " ".join(problem.reason for problem in summary.set_aside)
    assert 0 < summary.num_set_aside < 24
    rows = rows_of(tmp_path / "cache")
    assert len(rows) == 24 - summary.num_set_aside
    assert {row.finish_reason for row in rows} == {"stop"}


def test_keys_move_only_where_the_template_adds_an_end_token(tmp_path, writer):
    work = recipe(tmp_path, writer)
    sources = (PromptSource(source="a", path=str(tmp_path / "p.jsonl"), format="prompt_completion"),)

    def names(*ends) -> tuple[str, list[bytes]]:
        rows = list_rows(
            read_prompts(sources, Problems()), sources, Generate(), 0, Problems(), foreign_ends=list(*ends)
        )
        return job_id(request_of(work, None, "t", 128, *ends)), [row.row_key for row in rows]

    assert names() == names([None])
    assert names()[0] != names([2])[0]
    assert not set(names()[1]) & set(names([2])[1])

"""`generate.model`: a student answers, the teacher scores; compared with each model run alone and with dense
distributions.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.errors import DecantError, EngineError, IdentityError
from shared.parts.records import list_records
from shared.recipe.recipe import Recipe
from shared.recipe.sections.teacher import on_engine
from teacher_cache import engines
from teacher_cache.build import teach
from tests.tiny_models import make_qwen3

ROWS = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return make_qwen3(directory / "teacher", end_scale=1.5), make_qwen3(
        directory / "student", end_scale=1.5, seed=1, num_layers=1
    )


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """What happened to engines: "open NAME" and "close NAME", in order."""
    events: list[str] = []
    stock = engines.open_engine

    def open_engine(teacher, capture, **settings):
        engine = stock(teacher, capture, **settings)
        name = f"{Path(teacher.model).name} {'scores' if capture else 'answers'}"
        events.append(f"open {name}")
        close = engine.close
        engine.close = lambda: (events.append(f"close {name}"), close())
        return engine

    monkeypatch.setattr(engines, "open_engine", open_engine)
    return events


def recipe(tmp_path: Path, teacher: Path, cache: str, answerer: Path | None, **settings) -> Recipe:
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How many apples, number {i}?"}) + "\n" for i in range(ROWS)))
    generate = {"temperature": 0.0, "max_new_tokens": 12, "model": None if answerer is None else str(answerer)}
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32", "max_model_len": 128},
            "prompts": [{"source": "math", "path": str(path), "format": "prompt_completion"}],
            "generate": {**generate, **settings},
            "capture": {"k": 8},
            "cache": str(tmp_path / cache),
            "rows_per_part": 4,
        }
    )


def rows_of(cache: Path) -> list:
    opened = Cache.open(cache, verify=True)
    return [opened[i] for i in range(len(opened))]


def dense_logprobs(model: Path, token_ids: np.ndarray) -> np.ndarray:
    """[T, V] float64 log-probabilities of the next token."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        ids = torch.tensor(token_ids.astype(np.int64))[None]
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0].double()
    return logits.log_softmax(-1).numpy()


def test_student_answers_and_teacher_scores_one_after_the_other(tmp_path, models, opened):
    teacher, student = models
    teach(recipe(tmp_path, teacher, "both", student), max_set_aside=0.5)
    assert opened == ["open student answers", "close student answers", "open teacher scores", "close teacher scores"]
    both = rows_of(tmp_path / "both")
    teach(recipe(tmp_path, student, "alone", None), max_set_aside=0.5)
    alone = {row.prompt: row for row in rows_of(tmp_path / "alone")}
    assert len(both) == len(alone) > 5
    for row in both:
        np.testing.assert_array_equal(row.token_ids, alone[row.prompt].token_ids)
        assert row.row_key != alone[row.prompt].row_key
        (start, end) = row.spans[0]
        dense = dense_logprobs(teacher, row.token_ids)[start - 1 : end - 1]
        np.testing.assert_allclose(
            row.targets.label_logprobs, dense[np.arange(end - start), row.token_ids[start:end]], atol=0.04
        )
        np.testing.assert_allclose(row.targets.logprobs.reshape(-1, 8), np.sort(dense)[:, ::-1][:, :8], atol=0.04)
    records = list_records(tmp_path / "both/sequences")
    assert {record.software["answers"] for record in records} == {str(student)}


def test_answers_of_both_models_to_one_prompt_are_different_rows(tmp_path, models):
    teacher, student = models
    first = teach(recipe(tmp_path, teacher, "cache", student), max_set_aside=0.5)
    second = teach(recipe(tmp_path, teacher, "cache", None), max_set_aside=0.5)
    assert second.generated.rows == second.rows - first.rows > 5
    assert list(verify_cache(tmp_path / "cache")) == []
    rows = rows_of(tmp_path / "cache")
    assert len({row.row_key for row in rows}) == len(rows)
    assert len({row.group_key for row in rows}) < len(rows)


def test_build_that_ends_between_the_passes_continues_without_the_student(tmp_path, models, opened, monkeypatch):
    teacher, student = models
    wanted = recipe(tmp_path, teacher, "cache", student)
    recorded = engines.open_engine

    def no_scores(teacher, capture, **settings):
        if capture is not None:
            raise EngineError("the machine went away")
        return recorded(teacher, capture, **settings)

    monkeypatch.setattr(engines, "open_engine", no_scores)
    with pytest.raises(EngineError, match="went away"):
        teach(wanted, max_set_aside=0.5)
    assert opened == ["open student answers", "close student answers"]
    monkeypatch.setattr(engines, "open_engine", recorded)
    summary = teach(wanted, max_set_aside=0.5)
    assert opened[2:] == ["open teacher scores", "close teacher scores"]
    assert (summary.generated.rows, summary.scored.rows) == (0, summary.rows)
    teach(wanted, max_set_aside=0.5)
    assert len(opened) == 4
    moved = student.rename(student.with_name("moved"))
    try:  # the same model under another name is the same job
        again = teach(recipe(tmp_path, teacher, "cache", moved), max_set_aside=0.5)
    finally:
        moved.rename(student)
    assert (again.generated.rows, len(opened)) == (0, 4)


def test_model_with_another_tokenizer_or_none_is_refused(tmp_path, models):
    other = make_qwen3(tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(IdentityError, match=r"generate.model .*other has another tokenizer"):
        teach(recipe(tmp_path, models[0], "cache", other))
    with pytest.raises(DecantError, match=r"generate.model: .*missing"):
        teach(recipe(tmp_path, models[0], "cache", tmp_path / "missing"))
    assert not (tmp_path / "cache").exists()


def test_prompts_that_only_the_teacher_has_room_for_are_set_aside(tmp_path, models):
    short = make_qwen3(tmp_path / "short", end_scale=1.5, seed=1, num_layers=1, max_position_embeddings=16)
    with pytest.raises(DecantError, match="max_model_len = 16"):
        teach(recipe(tmp_path, models[0], "cache", short))


@pytest.mark.slow
def test_vllm_closes_one_model_and_opens_the_other(tmp_path, models, opened):
    pytest.importorskip("vllm")
    teacher, student = models
    wanted = recipe(tmp_path, teacher, "vllm", student)
    section = on_engine("vllm", wanted.teacher)
    teach(wanted.model_copy(update={"teacher": section}), max_set_aside=0.5)
    assert opened == ["open student answers", "close student answers", "open teacher scores", "close teacher scores"]
    teach(recipe(tmp_path, teacher, "reference", student), max_set_aside=0.5)
    reference = {row.row_key: row for row in rows_of(tmp_path / "reference")}
    found = {row.row_key: row for row in rows_of(tmp_path / "vllm")}
    assert set(found) == set(reference)
    same = [key for key in found if np.array_equal(found[key].token_ids, reference[key].token_ids)]
    assert len(same) >= len(found) - 1  # a tie may fall otherwise
    for key in same:
        np.testing.assert_allclose(found[key].targets.label_logprobs, reference[key].targets.label_logprobs, atol=0.07)

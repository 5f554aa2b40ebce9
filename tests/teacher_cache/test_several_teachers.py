"""Several teachers over one cache: each scores the same rows into a layer of its name, and answers are told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.layer_choice import layer_of_capture
from shared.cache.layout import list_layers
from shared.errors import UsageError
from shared.recipe.recipe import Recipe
from teacher_cache import build
from teacher_cache.build import teach
from teacher_cache.several_teachers import teach_each
from teacher_cache.teacher.answerer import answerer_key
from tests.tiny_models import make_qwen3

ROWS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_qwen3(root / name, end_scale=1.5, seed=seed) for seed, name in enumerate(("own", "math"))}


def section(model: Path) -> dict:
    return {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 128}


def recipe_of(tmp_path: Path, own: Path, **more) -> Recipe:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How many apples, number {i}?"}) + "\n" for i in range(ROWS)))
    settings = {
        "name": "test",
        "output_dir": str(tmp_path / "run"),
        "teacher": section(own),
        "prompts": [{"source": "math", "path": str(path), "format": "prompt_completion"}],
        "generate": {"temperature": 0.0, "max_new_tokens": 8},
        "capture": {"k": 8},
        "cache": str(tmp_path / "cache"),
    }
    return Recipe.model_validate({**settings, **more})


def dense_labels(model: Path, row) -> np.ndarray:
    """[S] log-probabilities of a row's labels by a whole forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.tensor(row.token_ids.astype(int))[None])
    logprobs = logits.logits[0].double().log_softmax(-1)[row.predictor_index()]
    return logprobs.gather(1, torch.from_numpy(row.labels().astype(np.int64))[:, None])[:, 0].numpy()


def test_each_teacher_scores_the_same_rows_into_a_layer_of_its_name(tmp_path, models):
    recipe = recipe_of(tmp_path, models["own"], teachers={"math": section(models["math"])})
    found = teach_each(recipe)
    assert {name: one.scored.rows for name, one in found.items()} == {"teacher": ROWS, "math": ROWS}
    assert [layer.short_name for layer in list_layers(recipe.cache[0]).values()] == ["math", "top8"]
    own, other = Cache.open(recipe.cache[0], "top8"), Cache.open(recipe.cache[0], "math")
    assert layer_of_capture(recipe) == own.layer_name
    for index in (0, ROWS - 1):
        assert own[index].key == other[index].key
        for cache, model in ((own, models["own"]), (other, models["math"])):
            expected = dense_labels(model, cache[index])
            np.testing.assert_allclose(cache[index].targets.label_logprobs, expected, atol=0.02)
    again = teach_each(recipe)
    assert not any(one.computed for one in again.values())


def test_one_teacher_alone_scores_what_is_there(tmp_path, models):
    recipe = recipe_of(tmp_path, models["own"], teachers={"math": section(models["math"])})
    with pytest.raises(UsageError, match=r"--layer math: there is no cache at .* with --layer teacher"):
        teach_each(recipe, "math")
    assert list(teach_each(recipe, "teacher")) == ["teacher"]
    found = teach_each(recipe, "math")
    assert (list(found), found["math"].generated.rows, found["math"].scored.rows) == (["math"], 0, ROWS)
    with pytest.raises(UsageError, match="did you mean 'math'"):
        teach_each(recipe, "maths")


def test_a_teacher_that_scored_under_another_name_is_not_asked_again(tmp_path, models):
    teach(recipe_of(tmp_path, models["own"]))
    recipe = recipe_of(tmp_path, models["own"], teachers={"same": section(models["own"])})
    with pytest.raises(UsageError, match="is held by layer top8-"):
        teach_each(recipe)


@pytest.mark.parametrize("begun_before", [False, True])
def test_answers_of_two_teachers_are_different_rows(tmp_path, models, monkeypatch, begun_before):
    if begun_before:  # a cache of an earlier version says nothing of who answered; its jobs do
        stock = build.sequences_identity
        monkeypatch.setattr(build, "sequences_identity", lambda *args: replace(stock(*args), answerer=""))
    recipes = [recipe_of(tmp_path, models[name]) for name in ("own", "math")]
    alone = recipe_of(tmp_path, models["math"], cache=str(tmp_path / "alone"))
    for recipe in (*recipes, alone):
        teach(recipe)
    cache = Cache.open_sequences(recipes[0].cache[0])
    assert len(cache) == 2 * ROWS
    assert len({bytes(key) for key in cache.row_keys}) == 2 * ROWS
    responses = [cache[index].response for index in range(2 * ROWS)]
    of_math = [Cache.open_sequences(alone.cache[0])[index].response for index in range(ROWS)]
    assert sorted(responses[ROWS:]) == sorted(of_math) != sorted(responses[:ROWS])
    assert len(set(np.asarray(cache.group_keys).tolist())) == ROWS  # a prompt stays on one side of the hold-out
    for recipe in recipes:
        assert teach(recipe).generated.rows == 0
    keys = [answerer_key(recipe.generate, recipe.teacher, recipe.cache[0]) for recipe in recipes]
    assert keys[0] is None
    assert keys[1]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"teachers": {"teacher": {"model": "x"}}}, "is the name of another model"),
        ({"teachers": {"top8": {"model": "x"}}}, "is the name of a capture"),
        ({"teachers": {"Math": {"model": "x"}}}, "pattern"),
        ({"teachers": {"math": {"model": "x"}}, "teacher": None, "prompts": [], "generate": None}, "no `teacher`"),
        ({"teachers": {"math": {"model": "x"}}, "cache": ["a", "b"], "prompts": [], "generate": None}, "one cache"),
    ],
)
def test_teachers_that_cannot_be_are_refused_in_the_recipe(tmp_path, models, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe_of(tmp_path, models["own"], **changed)


@pytest.mark.parametrize(
    ("own", "other", "told"), [(64, 30, True), (None, 64, True), (64, 64, False), (64, None, False)]
)
def test_a_plan_names_a_teacher_that_takes_shorter_rows_than_may_be_made(tmp_path, models, own, other, told):
    from tools.plan.planner import plan

    other_section = {**section(models["math"]), "max_model_len": other}
    recipe = recipe_of(
        tmp_path,
        models["own"],
        teacher={**section(models["own"]), "max_model_len": own},
        teachers={"math": other_section},
    )
    sentences = [line for line in plan(recipe)["assumptions"] if line.startswith("teacher math takes")]
    assert bool(sentences) == told
    assert not told or f"lower teacher.max_model_len to {other}" in sentences[0]

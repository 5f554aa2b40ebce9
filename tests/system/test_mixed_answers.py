"""A cache with answers drawn in two ways, and a list of caches that share rows: what a training reads of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.keys import is_heldout
from shared.recipe.file import load_recipe
from tests.system.program import write_lines
from tests.tiny_models import make_qwen3
from tools import cli

RECIPE = """\
name: mixed
output_dir: run
teacher: {model: teacher, engine: transformers, dtype: float32, max_model_len: 96}
prompts: [{source: a, path: prompts.jsonl, format: messages}]
generate: {max_new_tokens: 6}
capture: {k: 8}
cache: run/cache
rows_per_part: 4
heldout: {fraction: 0}
student: {model: teacher}
stages: [{name: kd, losses: [{name: forward_kl}], trainer: {max_steps: 2, pack_tokens: 128}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a cache of 6 prompts answered at temperature 1 (`first`) and one with answers at 0.7 besides."""
    path = tmp_path_factory.mktemp("mixed")
    make_qwen3(path / "teacher", seed=0, num_layers=1)
    turns = [[{"role": "user", "content": f"How many are {i}?"}] for i in range(6)]
    write_lines(path / "prompts.jsonl", [{"messages": messages} for messages in turns])
    (path / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert cli.main(["teach", "recipe.yaml"]) == 0
        shutil.copytree(path / "run" / "cache", path / "first")
        assert cli.main(["teach", "recipe.yaml", "--set", "generate.temperature=0.7"]) == 0
    return path


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def trained(*overrides: str):
    """Return the row_keys that the stage trains on, and its caches."""
    from student_train.stage.stage_order import open_caches

    recipe = load_recipe("recipe.yaml", overrides)
    caches = open_caches(recipe, recipe.stages[0])
    return sorted(caches[int(row)].row_key for row in caches.training_rows(0.0)), caches


def keys(path: str, *, but: set[bytes] = frozenset()) -> list[bytes]:
    cache = Cache.open(path)
    return sorted(cache[i].row_key for i in range(len(cache)) if cache[i].row_key not in but)


def test_answers_drawn_otherwise_are_left_out_and_counted():
    assert len(keys("run/cache")) == 12
    rows, caches = trained()
    assert rows == keys("first")
    assert int(caches.other_answers.sum()) == 6
    cooler, _ = trained("generate.temperature=0.7")
    assert cooler == keys("run/cache", but=set(keys("first")))


def test_all_answers_are_trained_on_where_the_recipe_says_so_or_has_no_prompts():
    assert trained("answers=all")[0] == keys("run/cache")
    assert trained("prompts=[]", "generate=null")[0] == keys("run/cache")


def test_a_recipe_that_no_answer_was_drawn_for_trains_on_what_is_there_and_says_so():
    rows, caches = trained("generate.max_new_tokens=5")
    assert rows == keys("run/cache")
    assert caches.all_are_other


@pytest.mark.parametrize("order", ["[first, run/cache]", "[run/cache, first]"])
def test_a_row_of_two_caches_counts_once(order):
    rows, caches = trained(f"cache={order}", "prompts=[]", "generate=null", "teacher=null")
    assert rows == keys("run/cache")
    assert int(caches.repeats.sum()) == 6


def measured(*overrides: str, fraction: float = 0.6) -> tuple[list[bytes], list[bytes]]:
    """Return the row_keys that `eval` measures and those that a stage's evaluation does."""
    from student_train.evaluate.heldout_measure import HeldoutSet
    from student_train.stage.stage_order import open_caches
    from tools.evaluate.heldout.heldout import evaluate_heldout

    recipe = load_recipe("recipe.yaml", overrides)
    found = evaluate_heldout("teacher", [str(path) for path in recipe.cache], fraction, recipe=recipe)
    caches = open_caches(recipe, recipe.stages[0])
    chosen = HeldoutSet.choose(caches, fraction, 100).rows["a"]
    return sorted(map(bytes.fromhex, found["row_kl"])), sorted(caches[row].row_key for row in chosen)


def heldout(keys_: list[bytes], fraction: float = 0.6) -> list[bytes]:
    cache = Cache.open("run/cache")
    groups = {cache[i].row_key: cache[i].group_key for i in range(len(cache))}
    return [key for key in keys_ if is_heldout(groups[key], fraction)]


def test_held_out_rows_are_chosen_as_training_rows_are():
    first, second = keys("first"), keys("run/cache", but=set(keys("first")))
    assert 0 < len(heldout(first)) < 6
    assert measured() == (heldout(first), heldout(first))
    assert measured("generate.temperature=0.7") == (heldout(second), heldout(second))
    both = heldout(keys("run/cache"))
    assert measured("answers=all") == (both, both)
    assert measured("generate.max_new_tokens=5") == (both, both)  # none was drawn so


@pytest.mark.parametrize("order", ["[first, run/cache]", "[run/cache, first]"])
def test_a_held_out_row_of_two_caches_is_measured_once(order):
    both = heldout(keys("run/cache"))
    assert measured(f"cache={order}", "prompts=[]", "generate=null", "teacher=null") == (both, both)


def test_an_evaluation_is_another_one_only_where_a_held_out_row_is_left_out():
    from tools.evaluate.models.models import model_under_test
    from tools.evaluate.results.results import evaluation_identity

    def of(*overrides: str) -> dict:
        recipe = load_recipe("recipe.yaml", ["heldout.fraction=0.6", "evaluate={models: [teacher]}", *overrides])
        return evaluation_identity(recipe, model_under_test(recipe, "teacher"))["heldout"]

    assert "left_out" not in of("answers=all")
    assert "left_out" not in of("cache=first")
    assert of()["left_out"] != of("generate.temperature=0.7")["left_out"]
    assert {**of("answers=all"), "left_out": of()["left_out"]} == of()


def remade(place: Path, name: str, change: str) -> str:
    """Copy the first cache, make its rows again with a changed recipe, and return its path."""
    shutil.copytree(place / "first", place / name)
    assert cli.main(["teach", "recipe.yaml", "--set", f"cache={name}", "--set", change]) == 0
    return f"cache={name}"


@pytest.mark.parametrize(
    "change",
    ['prompts.0.system="Be brief."', "prompts.0.date=2026-01-31", 'prompts.0.chat_template_kwargs={"a": 1}'],
)
def test_rows_that_were_rendered_otherwise_are_left_out(place, tmp_path, change):
    cache = remade(place, f"rendered-{tmp_path.name}", change)
    path = cache.removeprefix("cache=")
    assert len(keys(path)) == 12
    assert trained(cache)[0] == keys("first")
    assert trained(cache, change)[0] == keys(path, but=set(keys("first")))
    assert trained(cache, change, "answers=all")[0] == keys(path)
    assert trained(cache, 'prompts.0.system="Neither."')[0] == keys(path)  # none was rendered so


def test_answers_of_another_model_are_left_out(place, tmp_path):
    """Where the teacher is not at hand, the cache's layer says what its weights are."""
    make_qwen3(place / "other", seed=1, num_layers=1)
    cache = remade(place, "answered", "generate.model=other")
    assert trained(cache)[0] == keys("first")
    others = keys("answered", but=set(keys("first")))
    assert len(others) == 6
    assert trained(cache, "generate.model=other")[0] == others
    (place / "teacher").rename(tmp_path / "teacher")
    try:
        assert trained(cache)[0] == keys("first")
    finally:
        (tmp_path / "teacher").rename(place / "teacher")


@pytest.mark.slow
def test_plan_and_training_say_what_is_left_out(capfd):
    assert cli.main(["plan", "recipe.yaml"]) == 0
    assert "holds 6 rows that were drawn or rendered otherwise" in capfd.readouterr().out
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert "6 rows left out that were drawn or rendered otherwise" in capfd.readouterr().err

"""Two trainings at once read one cache: each gets what it gets alone, and not a byte of the cache changes."""

from __future__ import annotations

import multiprocessing

import pytest

from student_train.stage.stages import run_stages
from tests.student_train.conftest import _train


def contents(cache):
    return {
        str(path.relative_to(cache)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in cache.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_two_trainings_at_once_share_a_cache_and_leave_it_as_it_was(recipe_of, tiny):
    recipes = [recipe_of(), recipe_of(losses=[{"name": "reverse_kl"}], student={"model": str(tiny.llama)})]
    alone = [
        recipe.model_copy(update={"output_dir": recipe.output_dir / f"alone{i}"}) for i, recipe in enumerate(recipes)
    ]
    together = [
        recipe.model_copy(update={"output_dir": recipe.output_dir / f"together{i}"}) for i, recipe in enumerate(recipes)
    ]
    for recipe in alone:
        run_stages(recipe)
    before = contents(tiny.cache)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.student_train.preload"])
    processes = [context.Process(target=_train, args=(recipe.model_dump(mode="json"), None)) for recipe in together]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(tiny.cache) == before
    for one, other in zip(alone, together, strict=True):
        for name in ("metrics.jsonl", "model/model.safetensors"):
            assert (one.output_dir / "train/kd" / name).read_bytes() == (
                other.output_dir / "train/kd" / name
            ).read_bytes()
        assert not list(other.output_dir.rglob("*.arrow")), "nothing is copied"

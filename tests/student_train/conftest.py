"""Tiny models and caches, made once; a process that has imported everything and forks runs to kill."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A teacher, students of two families and caches, as paths."""
    import torch

    from tests.student_train.tiny_caches import make_cache
    from tests.tiny_models import make_llama, make_qwen3

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")
    teacher = make_qwen3(root / "teacher", seed=1)
    return SimpleNamespace(
        root=root,
        teacher=teacher,
        qwen3=make_qwen3(root / "qwen3", seed=2, spread=0.05),
        llama=make_llama(root / "llama", seed=3, spread=0.05),
        padded=make_qwen3(root / "padded", seed=4, spread=0.05, vocab_size=576),
        cache=make_cache(root / "cache", teacher),
        drawn=make_cache(root / "drawn", teacher, num_rows=16, k=4, num_draws=3, first=100, sources=("extra",)),
        unscored=make_cache(root / "unscored", teacher, num_rows=16, layer=False),
    )


@pytest.fixture
def recipe_of(tiny, tmp_path):
    """Return a function that builds a recipe of one stage from keyword settings."""
    from shared.recipe.recipe import Recipe

    def build(*, student=None, trainer=None, cache=None, name="kd", losses=None, **stage):
        settings = {"learning_rate": 3e-3, "max_steps": 6, "pack_tokens": 192, "save_steps": 3, "report_to": "none"}
        return Recipe.model_validate(
            {
                "name": "test",
                "output_dir": str(tmp_path / "run"),
                "cache": [str(path) for path in (cache or [tiny.cache])],
                "heldout": {"fraction": 0.1},
                "student": {"model": str(tiny.qwen3), **(student or {})},
                "stages": [
                    {
                        "name": name,
                        "losses": losses
                        or [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}],
                        "trainer": {**settings, **(trainer or {})},
                        **stage,
                    }
                ],
            }
        )

    return build


@pytest.fixture(scope="session")
def run_apart():
    """Return a function that trains a recipe's stages in a process of its own, killed at a fail-point
    if one is named."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.student_train.preload"])

    def run(recipe, failpoint: str | None = None) -> int:
        process = context.Process(target=_train, args=(recipe.model_dump(mode="json"), failpoint))
        process.start()
        process.join(timeout=240)
        assert process.exitcode is not None, "the run hangs"
        return process.exitcode

    return run


def _train(recipe: dict, failpoint: str | None) -> None:
    import torch

    from shared.recipe.recipe import Recipe
    from student_train.stage.stages import run_stages

    torch.set_num_threads(1)
    if failpoint:
        os.environ["DECANT_FAILPOINT"] = failpoint
    run_stages(Recipe.model_validate(recipe))


def read_bytes(directory: Path, *names: str) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names}

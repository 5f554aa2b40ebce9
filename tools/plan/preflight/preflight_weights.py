"""What is known to be wrong with weights before any work: tensors not those of their class, adapters that match
nothing, a disk too small for what a run writes or keeps of a URL.

Cost: the headers of the files, the records of caches, and an empty model of the class, a second or two for any size; no
weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shared.places import origin_of
from shared.recipe.base import Problem
from shared.recipe.recipe import Recipe
from tools.plan.preflight.preflight_asked import Asked, Place, said


def weight_problems(asked: Asked) -> Iterator[Problem]:
    """Check the tensors of every model that is a directory with weights, and that a teacher's adapter fits it."""
    from shared.models.weights.checkpoint import check_checkpoint

    checked = set[tuple[str, str | None]]()
    for place, name, what, trusts, adapter in _models(asked):
        directory = Path(name)
        there = any(file for ending in ("safetensors", "bin", "index.json") for file in directory.glob(f"*.{ending}"))
        if there and (name, adapter) not in checked:
            checked.add((name, adapter))
            check = partial(check_checkpoint, directory, what=what, trust_remote_code=trusts, adapter=adapter)
            yield from said(place, check)


def _models(asked: Asked) -> Iterator[tuple[Place, str, str, bool, str | None]]:
    """Yield (place, directory or hub id, its name for people, whether its code runs, adapter) of what is loaded."""
    recipe, named = asked.recipe, asked.recipe.evaluate.models if "eval" in asked.phases else ()
    teacher, generate, student = recipe.teacher, recipe.generate, recipe.student
    if teacher is not None and (asked.builds or "teacher" in named):
        trusts = teacher.trust_remote_code
        yield ("teacher", "model"), teacher.model, "the teacher", trusts, None if asked.elsewhere else teacher.adapter
        if asked.builds and generate is not None and generate.model is not None:
            yield ("generate", "model"), generate.model, "the model that answers", trusts, None
    for name, other in recipe.teachers.items():
        if asked.builds or name in named:
            adapter = None if asked.elsewhere else other.adapter
            yield ("teachers", name, "model"), other.model, f"teacher {name}", other.trust_remote_code, adapter
    if student is None:
        return
    trusts = student.trust_remote_code
    trained = recipe.stages if "train" in asked.phases else ()
    if student.init != "random" and ("base" in named or any(stage.init_from == "base" for stage in trained)):
        yield ("student", "model"), student.model, "the student", trusts, None
    for i, name in enumerate(named):
        if name not in ("teacher", "base", *recipe.teachers) and "train" not in asked.phases:
            directory = recipe.stage_dir(name) / "model"
            yield ("evaluate", "models", i), str(directory), f"the model of stage {name}", trusts, None
    for i, stage in enumerate(trained):
        if "/" in stage.init_from:
            yield ("stages", i, "init_from"), stage.init_from, f"the start of stage {stage.name}", trusts, None


def training_problems(asked: Asked) -> Iterator[Problem]:
    """Check that the student's adapter matches layers, and that the disk holds what the stages will write."""
    from student_train.student.student import DTYPES, add_adapter

    recipe, student = asked.recipe, asked.recipe.student
    if student is None or not (Path(student.model) / "config.json").is_file():
        return
    import torch

    from shared.models.weights.checkpoint import empty_model

    model = empty_model(Path(student.model), trust_remote_code=student.trust_remote_code, dtype=DTYPES[student.dtype])
    if model is None:
        return
    adapted: list[Any] = []

    def adapt() -> None:
        with torch.device("meta"):
            adapted.append(add_adapter(model, student.adapter))

    yield from said(("student", "adapter", "target_modules"), adapt)
    if adapted and not student.adapter.holds_4_bits and not asked.elsewhere:
        yield from _disk(recipe, adapted[0], adapted=not student.adapter.trains_all_weights)


def window_problems(asked: Asked) -> Iterator[Problem]:
    """Check that this machine keeps the parts that each stage reads at a time of a URL."""
    recipe = asked.recipe
    if len(asked.caches) == len(recipe.cache) and any(origin_of(path) is not None for path in recipe.cache):
        from student_train.stage.stage_order import open_caches

        for i, stage in enumerate(recipe.stages):
            yield from said(("stages", i, "window_parts"), partial(open_caches, recipe, stage))


def cache_problems(asked: Asked) -> Iterator[Problem]:
    """Check that the disk holds a cache that a whole run begins, as a plan does. Cost: a pass over the prompts."""
    from tools.plan.planner import plan, require_disk

    whole = {"teach", "train"} <= asked.phases and not asked.plans_only
    if whole and asked.recipe.prompts and not asked.caches:
        planned = plan(asked.recipe)
        yield from said(("cache", 0), lambda: require_disk(asked.recipe, planned))


def _disk(recipe: Recipe, model: Any, *, adapted: bool) -> Iterator[Problem]:
    """Check each stage that has no model yet; where only epochs are given, for one checkpoint alone."""
    from student_train.fit.disk_space import check_disk_space

    for i, stage in enumerate(recipe.stages):
        directory = recipe.stage_dir(stage.name)
        if not (directory / "model").is_dir():
            steps = stage.trainer.max_steps or 1
            yield from said(("stages", i), partial(check_disk_space, model, stage, steps, directory, adapted=adapted))

"""What an engine on any node of a cluster must know to join a build, and what it opens there.

A node may see other files than the one that planned the build, so everything is looked up again and compared: the
working directory, the cache, the teacher's weights (by the same samples that name the layer). Cost: what opening a
teacher costs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.cache.layout import Layer, read_header
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import EngineError
from shared.identity.identity import difference
from shared.parts.jobs import Job
from shared.recipe.recipe import Recipe, Teacher
from teacher_cache import engines
from teacher_cache.engines.protocol import Engine
from teacher_cache.passes.lazy_engine import require_planned_length
from teacher_cache.prompts.sequence_maker import SequenceMaker
from teacher_cache.teacher.teacher_identity import KnownTeacher, know_teacher, layer_identity


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """What an engine must know to join a build."""

    recipe: dict[str, Any]
    directory: str
    """The build's working directory, which the recipe's paths are relative to; the same on every node."""
    environment: dict[str, str]
    """Settings of the engine's libraries, where the node has none of its own."""
    layer: str
    """Directory of the targets layer."""
    job_id: str | None
    max_model_len: int


@dataclass(slots=True)
class Loaded:
    """What the engine's thread works with."""

    recipe: Recipe
    cache: CacheWriter
    layer: LayerWriter
    job: Job | None
    maker: SequenceMaker
    engine: Engine
    teacher: Teacher


def load_order(order: WorkOrder, should_stop: Callable[[], bool]) -> Loaded:
    """Open cache and teacher on this node.

    Raises:
        EngineError: this node does not see the build's files, or has another teacher than the build.
        DecantError: whatever opening them raises.
    """
    for name, value in order.environment.items():
        os.environ.setdefault(name, value)
    node = os.uname().nodename
    try:
        os.chdir(order.directory)
    except OSError as error:
        raise EngineError(
            f"{node}: {order.directory} cannot be entered ({error.strerror}); run `decant teach` in a directory that "
            "every node of the cluster has under the same path"
        ) from None
    recipe = Recipe.model_validate(order.recipe)
    teacher = recipe.teacher
    assert teacher is not None
    if not (recipe.cache[0] / "cache.json").is_file():
        raise EngineError(f"{node}: {recipe.cache[0]} is not there; every node must see the cache's directory")
    known = know_teacher(teacher)
    cache = CacheWriter.create_or_open(recipe.cache[0], read_header(recipe.cache[0]).identity, known.tokenizer_files)
    layer = _layer(cache, order.layer, recipe, known, node)
    job = None if order.job_id is None else Job(cache.path / "jobs" / order.job_id)
    settings = teacher.model_copy(update={"max_model_len": order.max_model_len})
    engine = engines.open_engine(
        settings,
        recipe.capture,
        for_generation=recipe.generate,
        model_dir=known.files.directory,
        should_stop=should_stop,
    )
    try:
        require_planned_length(engine, order.max_model_len, f"{node}: ")
    except EngineError:
        engine.close()
        raise
    maker = SequenceMaker(known.tokenizer, recipe.prompts, known.vocab_size, order.max_model_len)
    return Loaded(recipe, cache, layer, job, maker, engine, teacher)


def _layer(cache: CacheWriter, name: str, recipe: Recipe, known: KnownTeacher, node: str) -> LayerWriter:
    """Open the build's layer, and compare this node's teacher with it.

    Raises:
        EngineError: this node has other weights.
    """
    assert recipe.teacher is not None
    layer = Layer.read(cache.path / "targets" / name)
    differing = difference(layer.identity, layer_identity(known, recipe.teacher, recipe.capture))
    if differing:
        raise EngineError(f"{node} has another teacher than the build: {differing}; put the same model on every node")
    return LayerWriter(cache, layer)

"""Which teachers a stage learns from: its targets layers, opened beside its rows, and the sources that each teaches.

Cost: small files of each layer.
"""

from __future__ import annotations

import numpy as np

from shared.cache.cache import Cache
from shared.cache.layer_choice import named_layer
from shared.errors import TrainingError
from shared.recipe.recipe import Recipe, Stage
from shared.recipe.sections.target_layers import layer_keys
from student_train.batch.dataset import CacheList
from student_train.batch.teacher_layers import TeacherLayer


def teacher_layers(recipe: Recipe, stage: Stage, caches: CacheList) -> tuple[TeacherLayer, ...]:
    """Open the layers that a stage with several teachers names, over the rows of its caches.

    Raises:
        TrainingError: a source is in none of the caches, or the caches grew meanwhile.
        CacheError: a cache lacks a layer, or a layer lacks rows.
    """
    assert isinstance(stage.targets, tuple)
    layers = []
    for key, entry in zip(layer_keys(stage.targets), stage.targets, strict=True):
        opened = tuple(Cache.open(path, named_layer(recipe, entry.layer, path)) for path in recipe.cache)
        for cache, rows in zip(opened, caches.caches, strict=True):
            if not np.array_equal(cache.row_keys, rows.row_keys):
                raise TrainingError(f"{cache.path} grew while it was opened; run the same command again")
        sources = caches.mixture_codes(None if entry.sources is None else dict.fromkeys(entry.sources, 1))
        layers.append(TeacherLayer(key, opened, None if sources is None else frozenset(sources), entry.mean_weight))
    return tuple(layers)


def untaught_sources(stage: Stage, caches: CacheList) -> list[str]:
    """Return the sources that a stage trains on and none of its several teachers teaches.

    Raises:
        TrainingError: there are some, and no loss of the stage is without a teacher.
    """
    untaught = [caches.source_names[code] for code in caches.untaught_codes]
    found = untaught if stage.mixture is None else [name for name in stage.mixture if name in untaught]
    if found and all(loss.learns_from == "targets" for loss in stage.losses):
        raise TrainingError(
            f"stage '{stage.name}' trains on source '{found[0]}', which no layer of its `targets` teaches, and has no "
            "other loss; name it under the `sources` of one, or leave it out of `mixture`"
        )
    return found

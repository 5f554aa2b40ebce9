"""What is known to be wrong with the stages before any work: starts, layers, temperatures, sources, optimizers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.cache.layer_choice import loss_problem, named_layer
from shared.cache.layout import choose_layer, list_hidden_layers, list_layers, sequences_dir
from shared.errors import DecantError
from shared.identity.identity import layer_short_name
from shared.parts.records import list_records
from shared.payload.narrowing import LayerView
from shared.recipe.base import Problem, closest, quoted
from shared.recipe.sections.losses import Loss, OnTargets, unfit
from shared.recipe.sections.optimizers import OPTIMIZERS
from shared.recipe.sections.training import Stage, StageTrainer
from tools.plan.plan_lengths import row_lengths
from tools.plan.preflight.preflight_asked import Asked, Place, said

LAYER_NAME = re.compile(r"(top\d+)?(-?sample\d+)?", re.ASCII)


def stage_problems(asked: Asked) -> Iterator[Problem]:
    """Check what each stage reads: where it starts, layers, temperatures, sources, optimizer, reporters."""
    for i, path in enumerate(asked.recipe.cache):
        if path not in asked.caches and not asked.builds:
            said_of = f"there is no cache at '{path}' to train from; build it with `decant teach`, or name another"
            yield ("cache", i), said_of
    sources = _sources(asked)
    for i, stage in enumerate(asked.recipe.stages):
        if "/" in stage.init_from:
            from student_train.stage.stage_start import model_directory

            def there(stage: Stage = stage) -> None:
                if not (model_directory(stage.name, stage.init_from) / "config.json").is_file():
                    raise DecantError(f"'{stage.init_from}' holds no config.json; name the directory of a model")

            yield from said(("stages", i, "init_from"), there)
        for name in stage.mixture or {}:
            yield from _unknown_source(("stages", i, "mixture", name), name, sources)
        yield from _refused_rows(asked, i, stage)
        yield from ((("stages", i, *place), said) for place, said in _taught_sources(stage, sources))
        yield from ((("stages", i, *place), said) for place, said in _layers(asked, stage))
        yield from ((("stages", i, "trainer", *place), said) for place, said in _trainer(asked, stage.trainer))


def _refused_rows(asked: Asked, i: int, stage: Stage) -> Iterator[Problem]:
    """Check that a stage which refuses rows that are too long for its student has none."""
    from student_train.stage.student_length import within_positions

    student = asked.recipe.student
    if stage.too_long == "refuse" and student is not None and asked.caches and Path(student.model).is_dir():

        def fits() -> None:
            within_positions(stage, student, int(row_lengths(asked.recipe).max(initial=0)))

        yield from said(("stages", i, "too_long"), fits)


def _sources(asked: Asked) -> set[str] | None:
    """Return the sources that the rows have or will have; None where that cannot be said."""
    if any(prompt.of_cache and not prompt.source for prompt in asked.recipe.prompts):
        return None
    found = {prompt.source for prompt in asked.recipe.prompts} if asked.builds else set()
    for path in asked.caches:
        for record in list_records(sequences_dir(path)):
            found |= set(record.stats.get("sources", {}))
    return found or None


def _unknown_source(place: Place, name: str, sources: set[str] | None) -> Iterator[Problem]:
    """Name a source that no row has or will have, where that can be said."""
    if sources is not None and name not in sources:
        near = closest(name, sorted(sources))
        yield place, f"no row has the source '{name}'; expected {quoted(sorted(sources))}{near}"


def _layers(asked: Asked, stage: Stage) -> Iterator[Problem]:
    """Check that the layers that a stage names are there or will be, with its temperatures."""
    recipe = asked.recipe
    on_hidden = [(j, loss.name) for j, loss in enumerate(stage.losses) if loss.learns_from == "hidden"]
    if on_hidden and not (asked.builds and recipe.capture.hidden):
        for path in asked.caches or recipe.cache:
            if not list_hidden_layers(path):
                sentence = f"'{on_hidden[0][1]}' reads a hidden layer and {path} has none; add capture.hidden"
                yield ("losses", on_hidden[0][0], "name"), sentence
    for j, _ in on_hidden:
        yield from said(("losses", j, "name"), partial(_require_hidden, asked, stage, stage.losses[j]))
    if isinstance(stage.targets, tuple):
        for i, entry in enumerate(stage.targets):
            yield from _layer(asked, stage, entry.layer, ("targets", i, "layer"))
    elif stage.targets is not None or stage.needs_teacher:
        yield from _layer(asked, stage, stage.targets, ("targets",))


def _require_hidden(asked: Asked, stage: Stage, loss: Loss) -> None:
    """Refuse a loss on a hidden layer that cannot be had: of what the layer will not keep, or beside these settings.

    Raises:
        TrainingError: with the setting to change.
    """
    from student_train.layers.layer_losses import check_layer_losses, pairs_of
    from teacher_cache.teacher.model_files import resolve_model
    from tools.plan.plan_hidden import hidden_layer_to_train

    student = asked.recipe.student
    if student is None:
        return
    check_layer_losses(stage.model_copy(update={"losses": (loss,)}), student)
    try:
        identity = hidden_layer_to_train(asked.recipe, stage)
        num_layers = resolve_model(student.model, student.revision).num_hidden_layers
    except DecantError:
        return  # of a layer or student out of reach, or told elsewhere
    assert identity is not None
    pairs_of([loss], identity, num_layers)


def _taught_sources(stage: Stage, sources: set[str] | None) -> Iterator[Problem]:
    """Check that the sources of several teachers are there, and that each source has a teacher or another loss."""
    if not isinstance(stage.targets, tuple) or sources is None:
        return
    taught: set[str] = set()
    for i, entry in enumerate(stage.targets):
        taught |= sources if entry.sources is None else set(entry.sources)
        for j, name in enumerate(entry.sources or ()):
            yield from _unknown_source(("targets", i, "sources", j), name, sources)
    untaught = sorted((sources if stage.mixture is None else set(stage.mixture)) - taught)
    if untaught and all(loss.learns_from == "targets" for loss in stage.losses):
        sentence = (
            f"no layer teaches the source '{untaught[0]}' and no loss goes without a teacher; name it under the "
            "`sources` of one, or leave it out of `mixture`"
        )
        yield ("targets",), sentence


def _layer(asked: Asked, stage: Stage, wanted: str | None, place: Place) -> Iterator[Problem]:
    """Check that one layer is there or will be, with the stage's temperatures."""
    recipe = asked.recipe
    coming = ["teacher", *recipe.teachers, layer_short_name(recipe.capture)] if asked.builds else []
    if coming and (wanted is None or any(f"{wanted}-".startswith(f"{name}-") for name in coming)):
        yield from _unfit(stage, recipe.capture.mode, "the recipe's capture is")
        return
    if asked.plans_only and not asked.caches and wanted and LAYER_NAME.fullmatch(wanted):
        return  # a layer that another command builds before
    for path in asked.caches or recipe.cache:
        layers = list_layers(path)
        chosen = named_layer(recipe, wanted, path)
        name = chosen.name if isinstance(chosen, LayerView) else chosen
        if not layers:
            yield place, f"{path} has no targets layer (or is no cache yet); build it with `decant teach`"
            continue
        try:
            layer = choose_layer(layers, name, path)
        except DecantError as error:
            other = ", or capture it first: `decant teach` with its capture by --set" if recipe.teacher else ""
            yield place, f"{error}{other}"
            continue
        assert layer is not None
        yield from _unfit(stage, layer.identity.mode, f"layer {layer.full_name} was captured in")
        for j, loss in enumerate(stage.losses):
            problem = loss_problem(layer.identity, loss)
            if problem is not None:
                yield ("losses", j, "name"), f"{path}: {problem}"
            missing = sorted(set(loss.temperature.extremes()) - set(layer.identity.temperatures))
            if missing and loss.learns_from == "targets":
                have = ", ".join(f"{value:g}" for value in layer.identity.temperatures)
                sentence = f"temperature {missing[0]:g} is not in layer {layer.full_name}, only {have}; capture it"
                yield ("losses", j, "temperature"), sentence


def _unfit(stage: Stage, mode: str, said: str) -> Iterator[Problem]:
    """Name divergences that targets of a capture's mode cannot give."""
    for j, loss in enumerate(stage.losses):
        if isinstance(loss, OnTargets) and (why := unfit(loss.name, mode, by_entropy=loss.weigh == "entropy")):
            yield ("losses", j, "name"), f"{said} {why}"


def _trainer(asked: Asked, trainer: StageTrainer) -> Iterator[Problem]:
    """Check names that transformers gives, and packages."""
    for name in trainer.report_to:
        is_default = "report_to" not in trainer.model_fields_set
        if asked.elsewhere or (asked.plans_only and is_default):
            continue
        if name != "none" and importlib.util.find_spec(name) is None:
            yield ("report_to",), f"'{name}' is not installed here; install it, or leave it out"
    needed = OPTIMIZERS[trainer.optim].package
    if needed is not None and not asked.plans_only and importlib.util.find_spec(needed) is None:
        how = "install it (decant-kd[gpu] has bitsandbytes), or use adamw_torch"
        yield ("optim",), f"'{trainer.optim}' needs the package {needed}; {how}"

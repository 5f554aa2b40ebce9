"""One stage, resolved: where it starts, what it reads, in which order. No model is loaded.

Cost: columns of the caches without their tokens, and the plan of the stage's epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.layer_choice import loss_problem, named_layer
from shared.errors import TrainingError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import difference
from shared.recipe.recipe import Recipe, Stage, Student
from student_train.batch.dataset import CacheList
from student_train.batch.hidden_batch import HiddenReading
from student_train.batch.row_targets import temperature_column
from student_train.batch.stage_terms import hidden_reads, training_temperatures
from student_train.evaluate.heldout_measure import HeldoutSet
from student_train.order.evaluation_sampling import EvaluationSampling
from student_train.order.schedules import RunSteps
from student_train.order.stage_plan import StagePlan
from student_train.stage.cut_rows import rows_without_labels
from student_train.stage.stage_order import evaluation_sampling, open_caches, plan_order, run_steps, stage_seed
from student_train.stage.stage_start import start_directory
from student_train.stage.stage_teachers import untaught_sources
from student_train.student.forward_patch import Objective, patch_forward


@dataclass(frozen=True, slots=True)
class StageWork:
    """Everything that training one stage needs to know."""

    recipe: Recipe
    stage: Stage
    start: Path | None
    """Model directory that it starts from; None for the student's own weights."""
    caches: CacheList
    untaught: list[str]
    """Sources that no teacher of several teaches, whose rows train the other losses alone."""
    plan: StagePlan
    temperatures: tuple[float, ...] | None
    """Temperatures of its targets; None where labels are all it needs."""
    heldout: HeldoutSet | None
    """Rows that it is evaluated on while it trains."""
    run: RunSteps | None
    """Where it lies in the run; None where no schedule of it asks."""
    sampling: EvaluationSampling | None
    """What moves its shares, where its evaluations do."""
    num_unlabelled: int = 0
    """Rows that are cut before the first token that is trained."""
    hidden: HiddenReading | None = None
    """What its losses read of a hidden layer; None where none does."""
    patch: Callable[[Any, Objective], None] = patch_forward
    """Makes the student return the loss of a batch."""

    @property
    def student(self) -> Student:
        """The recipe's student."""
        assert self.recipe.student is not None
        return self.recipe.student

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.recipe.stage_dir(self.stage.name)

    @property
    def seed(self) -> int:
        """The stage's seed, or else the recipe's."""
        return stage_seed(self.recipe, self.stage)

    @property
    def belongs_to(self) -> dict[str, str]:
        """What a checkpoint of the stage records."""
        return {"plan": self.plan.hash, "cache": self.caches.cache_id}

    @property
    def origin(self) -> str:
        """Directory or hub id of the weights that it starts from."""
        return self.student.model if self.start is None else str(self.start)


def resolve_stage(recipe: Recipe, stage: Stage) -> StageWork:
    """Resolve a stage of a recipe that has a student.

    Raises:
        TrainingError: a temperature was not captured, a source is unknown, its start is not there, or nothing is left
            to train on.
        CacheError: a cache cannot be opened or lacks the layer.
    """
    assert recipe.student is not None
    start = start_directory(recipe, stage)
    caches = open_caches(recipe, stage)
    temperatures = training_temperatures(stage) if stage.needs_teacher else None
    scored = [cache for layer in caches.layers for cache in layer.caches] or caches.caches
    for cache in scored:
        for temperature in temperatures or ():
            assert cache.layer is not None
            temperature_column(cache.layer.temperatures, temperature)
        for loss in stage.losses:
            problem = loss_problem(cache.layer, loss) if cache.layer else None
            if problem is not None:
                raise TrainingError(f"{cache.path}: {problem}")
    untaught = untaught_sources(stage, caches)
    run = run_steps(recipe, stage)
    plan = plan_order(recipe, stage, caches, run)
    num_unlabelled = rows_without_labels(stage, plan, caches)
    heldout = _heldout(recipe, stage, caches)
    reads = hidden_reads(stage)
    return StageWork(
        recipe=recipe,
        stage=stage,
        start=start,
        caches=caches,
        untaught=untaught,
        plan=plan,
        temperatures=temperatures,
        heldout=heldout,
        run=run,
        sampling=evaluation_sampling(stage, plan, caches, heldout),
        num_unlabelled=num_unlabelled,
        hidden=HiddenReading(_one_hidden_layer(caches), reads) if reads else None,
    )


def _one_hidden_layer(caches: CacheList) -> HiddenIdentity:
    """Return the identity of the hidden layer that all caches were opened with.

    Raises:
        TrainingError: their hidden layers differ.
    """
    first = caches.caches[0].hidden_layer
    assert first is not None
    for cache in caches.caches[1:]:
        assert cache.hidden_layer is not None
        problem = difference(first, cache.hidden_layer)
        if problem:
            raise TrainingError(
                f"the hidden layers of {caches.path} and {cache.path} differ: "
                f"{problem.replace('the request', 'the other')}; train "
                "on caches whose hidden states were captured alike"
            )
    return first


def _heldout(recipe: Recipe, stage: Stage, caches: CacheList) -> HeldoutSet | None:
    """Return the rows that a stage is evaluated on; their distance to the teacher needs targets, even where the losses
    do not.
    """
    if stage.evaluate is None:
        return None
    scored = caches
    if not stage.needs_teacher:
        assert not isinstance(stage.targets, tuple), "a recipe with several teachers has a divergence from them"
        layers = [named_layer(recipe, stage.targets, path) for path in recipe.cache]
        scored = CacheList.open(recipe.cache, layers, recipe=recipe)
    return HeldoutSet.choose(scored, recipe.heldout.fraction, stage.evaluate.rows_per_source)

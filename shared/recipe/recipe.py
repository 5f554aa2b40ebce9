"""The recipe: everything that one experiment may say, validated before any work.

Sections are defined in `sections` and `assumptions` (sizes for the plan); this module puts them together and checks
what involves more than one of them. What depends on a cache's content (its temperatures, sources, layers) is checked
against the cache when it is opened. Paths are relative to the current directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from shared.errors import UsageError
from shared.places import named, resolved
from shared.recipe.assumptions import Assume, AssumedModel, AssumedSource
from shared.recipe.base import (
    MOST_SEED,
    CachePlace,
    Count,
    Integer,
    Name,
    Problem,
    RunPlace,
    Section,
    closest,
    one_or_many,
    quoted,
    repeated,
)
from shared.recipe.schedule import Schedule
from shared.recipe.sections.capture import Capture, TopCapture, server_problems
from shared.recipe.sections.curriculum import Balance, EarlyStopping, Sampling, StageEvaluation
from shared.recipe.sections.evaluation import Evaluate, Heldout, SideBySide, Task
from shared.recipe.sections.generate import Generate
from shared.recipe.sections.hidden import AttentionCapture, HiddenCapture
from shared.recipe.sections.losses import LABEL_LOSSES, Loss
from shared.recipe.sections.optimizers import OPTIMIZERS
from shared.recipe.sections.prompts import PromptSource
from shared.recipe.sections.rounds import Guards, Rounds
from shared.recipe.sections.teacher import Teacher, Workers, engine_of_student, unread_settings
from shared.recipe.sections.training import RESERVED_STAGE_NAMES, Adapter, Stage, StageTrainer, Student
from shared.schema import LAYER_NAME_PATTERN, MAX_ROWS_PER_PART

__all__ = [
    "Adapter",
    "Assume",
    "AssumedModel",
    "AssumedSource",
    "AttentionCapture",
    "Balance",
    "Capture",
    "EarlyStopping",
    "Evaluate",
    "Generate",
    "Guards",
    "Heldout",
    "HiddenCapture",
    "Loss",
    "PromptSource",
    "Recipe",
    "Rounds",
    "Sampling",
    "Schedule",
    "SideBySide",
    "Stage",
    "StageEvaluation",
    "StageTrainer",
    "Student",
    "Task",
    "Teacher",
    "Workers",
]

CAPTURE_NAME = re.compile(r"(top\d+)?(-?sample\d+)?", re.ASCII)
"""What a layer is called that no recipe names."""
LayerName = Annotated[str, Field(pattern=f"^{LAYER_NAME_PATTERN.pattern}$")]
"""Name of a targets layer: lower-case letters, digits, '.', '_', '+' or '-'."""


class Recipe(Section):
    """One experiment."""

    name: Name
    """Name of the experiment in reports."""
    output_dir: RunPlace
    """Where the run writes everything except the cache."""
    seed: Integer = 0
    """Seed of everything that has none of its own."""
    teacher: Teacher | None = None
    """The model to learn from, by its `engine` (left out: vllm); may be left out where the cache exists."""
    teachers: dict[LayerName, Teacher] = Field(default_factory=dict)
    """Further teachers of the same tokenizer, by the name of their targets layer: each scores the rows of the cache in
    turn, as `capture` says; hidden states come from `teacher` alone."""
    prompts: tuple[PromptSource, ...] = ()
    """What the teacher answers, or the answered prompts that it scores."""
    generate: Generate | None = None
    """How the teacher answers; left out: the data's answers are scored."""
    answers: Literal["matching", "all"] = "matching"
    """Rows to train on and to measure: those drawn and rendered as the recipe says, or also those made otherwise."""
    capture: Capture = TopCapture()
    """What is kept of the teacher's distributions, by its `mode` (left out: top)."""
    cache: Annotated[
        tuple[CachePlace, ...],
        Field(min_length=1),
        BeforeValidator(one_or_many, json_schema_input_type=Path | tuple[Path, ...]),
    ]
    """The cache's directory or URL (s3, gs, hf, https), or a list of them to train from."""
    rows_per_part: Annotated[Count, Field(le=MAX_ROWS_PER_PART)] = 1024
    """Rows in one file of the cache: what is lost at most when a machine dies."""
    heldout: Heldout = Heldout()
    """How many prompts are kept from every stage."""
    student: Student | None = None
    """The model that learns."""
    stages: tuple[Stage, ...] = ()
    """Training runs, in order."""
    evaluate: Evaluate = Evaluate()
    """The comparison at the end."""
    assume: Assume = Assume()
    """Sizes for `decant plan` where hub or data cannot be reached; nothing else reads them."""

    def _problems(self) -> Iterator[Problem]:
        for problems_of in (
            _teachers_problems,
            _phase1_problems,
            _unread_problems,
            _stage_problems,
            _temperature_problems,
            _rounds_problems,
            _rounding_problems,
            _evaluate_problems,
            _assume_problems,
        ):
            yield from problems_of(self)

    def stage(self, name: str) -> Stage:
        """Return the stage of that name.

        Raises:
            KeyError: there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    def stages_between(self, first: str | None, last: str | None) -> Sequence[Stage]:
        """Return the stages between two names, both included; None for the very first and the very last.

        Raises:
            UsageError: there is nothing to train, or no stage of a name.
        """
        names = [stage.name for stage in self.stages]
        if self.student is None or not names:
            raise UsageError("the recipe has no student or no stages, so there is nothing to train; add them")
        for name in (first, last):
            if name is not None and name not in names:
                known = f"{', '.join(names)}{closest(name, names)}"
                raise UsageError(f"stage '{name}' is not in the recipe, which has {known}; correct its name")
        begin, end = names.index(first or names[0]), names.index(last or names[-1])
        if begin > end:
            raise UsageError(f"stage '{first}' comes after stage '{last}'; swap --from-stage and --to-stage")
        return self.stages[begin : end + 1]

    def of_teacher(self, name: str) -> Recipe:
        """Return the recipe by which one of `teachers` scores the rows that the cache has."""
        capture = self.capture.model_copy(update={"hidden": None})
        alone = {"teacher": self.teachers[name], "prompts": (), "generate": None, "capture": capture}
        return self.model_copy(update=alone)

    def stage_dir(self, name: str) -> Path:
        """Return where a stage writes; its final model is in `model` below."""
        return self.output_dir / "train" / name


def _teachers_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.teachers and recipe.teacher is None:
        yield ("teachers",), "there is no `teacher` beside them; write one of them there"
    if recipe.teachers and len(recipe.cache) > 1:
        yield ("teachers",), f"teachers score one cache, not {len(recipe.cache)}; name one, or leave them out"
    stages = {stage.name for stage in recipe.stages}
    for name in recipe.teachers:
        if name in (*RESERVED_STAGE_NAMES, *stages) or CAPTURE_NAME.fullmatch(name):
            other = "a stage" if name in stages else "a capture" if CAPTURE_NAME.fullmatch(name) else "another model"
            yield ("teachers", name), f"'{name}' is the name of {other}; call the teacher something else"


def _phase1_problems(recipe: Recipe) -> Iterator[Problem]:
    teacher, generate = recipe.teacher, recipe.generate
    if recipe.prompts and teacher is None:
        yield ("prompts",), "there is no `teacher` to answer or score them; add one, or leave the prompts out"
    if generate is not None and not recipe.prompts:
        yield ("generate",), "there are no `prompts` to answer; add some, or leave it out"
    if any(one.is_served for one in (teacher, *recipe.teachers.values()) if one):
        yield from server_problems(recipe.capture)
    if recipe.prompts and len(recipe.cache) > 1:
        one_cache = f"prompts are built into one cache, not {len(recipe.cache)}; name one, or leave the prompts out"
        yield ("cache",), one_cache
    if teacher is not None and generate is not None and generate.model is not None:
        yield from _answering_problems(teacher)
    if teacher is not None and recipe.capture.hidden is not None:
        yield from _hidden_problems(teacher)
    for i, source in enumerate(recipe.prompts):
        if source.of_cache and generate is not None:
            yield ("prompts", i, "format"), "rows of a cache are answered already; leave `generate` out"
        if source.of_cache and any(resolved(source.path) == resolved(cache) for cache in recipe.cache):
            said = "is the cache that this recipe builds; without `prompts` its rows are scored"
            yield ("prompts", i, "path"), said
    for i in repeated(recipe.cache):
        yield ("cache", i), f"'{named(recipe.cache[i])}' is listed twice"


def _answering_problems(teacher: Teacher) -> Iterator[Problem]:
    """Say why no other model can answer beside this teacher."""
    if teacher.is_served:
        first = "build the answers with teacher.engine 'vllm' first, then score them with servers"
        yield ("generate", "model"), f"a server serves the teacher only; {first}"
    if teacher.workers is not None:
        alone = "leave `workers` out and use `decant teach --partition i/n`"
        yield ("generate", "model"), f"the engines of `teacher.workers` all run the teacher; {alone}"


def _hidden_problems(teacher: Teacher) -> Iterator[Problem]:
    """Say why hidden states of this teacher cannot be captured."""
    if teacher.quantization is not None:
        scheme = f"does not quantise as teacher.quantization '{teacher.quantization}' says"
        said = f"hidden states are captured by transformers, which {scheme}; leave one of both out"
        yield ("capture", "hidden"), said
    if teacher.workers is not None:
        alone = "leave `teacher.workers` out and use `decant teach --partition i/n`"
        yield ("capture", "hidden"), f"hidden states are captured by one engine; {alone}"


def _unread_problems(recipe: Recipe) -> list[Problem]:
    """Return settings of an engine that nothing in the recipe runs on."""
    teacher = recipe.teacher
    if teacher is None:
        return []
    rounds = [stage.rounds for stage in recipe.stages if stage.rounds is not None]
    at_work = {teacher.engine, *(engine_of_student(teacher, one.engine) for one in rounds)}
    if recipe.capture.hidden is not None:
        at_work.add("transformers")
    if recipe.evaluate.models:
        at_work.add(recipe.evaluate.engine)
    found = [(("teacher", *path), why) for path, why in unread_settings(teacher, at_work)]
    for name, other in recipe.teachers.items():
        found += [(("teachers", name, *path), why) for path, why in unread_settings(other, {other.engine})]
    return found


def _stage_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.stages and recipe.student is None:
        yield ("stages",), "there is no `student` to train; add one"
    if (recipe.stages or recipe.evaluate.models) and not 0 <= recipe.seed <= MOST_SEED:
        yield ("seed",), f"expected a number from 0 to {MOST_SEED}, found {recipe.seed}"
    places: dict[str, int] = {}
    for i, stage in enumerate(recipe.stages):
        if places.setdefault(stage.name, i) != i:
            yield ("stages", i, "name"), f"stage '{stage.name}' is listed twice; give each its own name"
    names = list(places)
    stops = [
        other.name
        for other in recipe.stages
        if other.evaluate is not None and other.evaluate.early_stopping is not None
    ]
    for i, stage in enumerate(recipe.stages):
        problem = _init_from_problem(stage.init_from, i, places, names)
        if problem:
            yield ("stages", i, "init_from"), problem
        if stage.evaluate is not None and recipe.heldout.fraction == 0:
            said = "heldout.fraction is 0, so there is nothing to evaluate on; raise it, or leave this out"
            yield ("stages", i, "evaluate"), said
        if stage.goes_over_run and stops:
            said = (
                f"a schedule goes over the run, whose number of steps is unknown since stage '{stops[0]}' may stop "
                "early; let it go over the stage, or leave early_stopping out"
            )
            yield ("stages", i), said


def _rounds_problems(recipe: Recipe) -> Iterator[Problem]:
    for i, stage in enumerate(recipe.stages):
        if stage.rounds is None:
            continue
        place = ("stages", i, "rounds")
        if recipe.teacher is None:
            yield place, "there is no `teacher` to score the student's answers; add one"
        if not recipe.prompts and not stage.rounds.sources:
            yield place, "there are no `prompts` to answer; add some, or `sources` here"
        for j, loss in enumerate(stage.losses):
            if loss.name in LABEL_LOSSES and recipe.capture.label != "head":
                mode = "mode: top+sample, " if recipe.capture.mode == "sample" else ""
                why = (
                    f"on the student's own answers '{loss.name}' needs what the teacher thinks of every token of them; "
                    f"say `capture: {{{mode}label: head}}`, or use forward_kl"
                )
                yield ("stages", i, "losses", j, "name"), why
        if recipe.student is not None and recipe.student.init == "random" and stage.init_from == "base":
            yield ("stages", i, "init_from"), "random weights answer nothing; train a stage before the rounds"


def _rounding_problems(recipe: Recipe) -> Iterator[Problem]:
    for i, stage in enumerate(recipe.stages):
        why = rounding_problem(recipe.student, stage.trainer) if recipe.student else None
        if why is not None:
            yield ("stages", i, "trainer", "rounding"), why


def rounding_problem(student: Student, trainer: StageTrainer) -> str | None:
    """Say why `trainer.rounding` cannot be honoured; None where it can."""
    if trainer.rounding == "nearest":
        return None
    if student.dtype != "bfloat16" or not student.adapter.trains_all_weights:
        return "it rounds updates of weights kept in bfloat16, and here none is trained; leave it out"
    if not OPTIMIZERS[trainer.optim].steps_weight_by_weight:
        known = ", ".join(name for name, one in OPTIMIZERS.items() if one.steps_weight_by_weight)
        return f"trainer.optim {trainer.optim} cannot step weight by weight; choose one of {known}"
    if trainer.fsdp != "none":
        return "it does not work on shards of weights; set trainer.fsdp: none, or leave it out"
    return None


def _init_from_problem(start: str, place: int, places: dict[str, int], names: list[str]) -> str | None:
    """Say what is wrong with where stage number `place` starts; `places` has every stage's number by its name."""
    if start == "base" or places.get(start, place) < place or (start == "previous" and place):
        return None
    if start == "previous":
        return "there is no stage before the first; start from 'base'"
    if "/" in start:  # a directory, or RUN:STAGE
        directories = (start, start.rpartition(":")[0])
        return None if any(each and Path(each).is_dir() for each in directories) else f"there is no directory '{start}'"
    if start in places:
        return f"stage '{start}' does not come earlier; list it first"
    choices = ["base", *(["previous"] if place else []), *(name for name in names if places[name] < place)]
    return f"'{start}' is none of {quoted(choices)} nor a directory (written with a '/'){closest(start, choices)}"


def _temperature_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.teacher is None or not recipe.prompts:
        return
    captured = recipe.capture.temperatures
    for i, stage in enumerate(recipe.stages):
        layers = [entry.layer for entry in stage.targets] if isinstance(stage.targets, tuple) else []
        captured_now = any(layer in ("teacher", *recipe.teachers) for layer in layers)
        if stage.targets is not None and not captured_now:
            continue
        for j, loss in enumerate(stage.losses):
            if loss.learns_from == "hidden":
                continue
            missing = sorted({value for value in loss.temperature.extremes() if value not in captured})
            if missing:
                wanted = ", ".join(f"{value:g}" for value in missing)
                have = ", ".join(f"{value:g}" for value in captured)
                sentence = f"temperature {wanted} is not captured, only {have}; add it to capture.temperatures"
                yield ("stages", i, "losses", j, "temperature"), sentence


def _evaluate_problems(recipe: Recipe) -> Iterator[Problem]:
    side_by_side = recipe.evaluate.side_by_side
    if recipe.evaluate.cost and recipe.heldout.fraction == 0 and not recipe.evaluate.tasks:
        said = "there is nothing to ask: no prompt is held out and there are no `tasks`; add some"
        yield ("evaluate", "cost"), said
    if recipe.evaluate.heldout_rows is not None and recipe.heldout.fraction == 0:
        yield ("evaluate", "heldout_rows"), "nothing is held out at heldout.fraction 0; raise it, or leave this out"
    if recipe.evaluate.own_answers is not None:
        lacks = {
            "no `teacher` to score the answers": recipe.teacher is None,
            "no `prompts` to answer": not any(source.of_turns for source in recipe.prompts),
            "no held-out prompt at heldout.fraction 0": recipe.heldout.fraction == 0,
        }
        for what, is_lacking in lacks.items():
            if is_lacking:
                yield ("evaluate", "own_answers"), f"there is {what}; add it, or leave this out"
    if side_by_side is not None and "heldout" in side_by_side.prompts and recipe.heldout.fraction == 0:
        said = "nothing is held out at heldout.fraction 0; raise it, or write `prompts: [tasks]`"
        yield ("evaluate", "side_by_side", "prompts"), said
    choices = list(dict.fromkeys(["teacher", *recipe.teachers, "base", *(stage.name for stage in recipe.stages)]))
    known = set(choices)
    for i, model in enumerate(recipe.evaluate.models):
        path = ("evaluate", "models", i)
        if model == "teacher" and recipe.teacher is None:
            yield path, "the recipe has no `teacher` section; add one, or leave it out here"
        elif model == "base" and recipe.student is None:
            yield path, "the recipe has no `student` section; add one, or leave it out here"
        elif model not in known:
            yield path, f"'{model}' is none of {quoted(choices)}{closest(model, choices)}"


def _assume_problems(recipe: Recipe) -> list[Problem]:
    sources = sorted({prompt.source for prompt in recipe.prompts})
    return [
        (("assume", "sources", name), f"no entry of `prompts` has this source{closest(name, sources)}")
        for name in recipe.assume.sources
        if name not in sources
    ]

"""All rounds of a recipe's stages in their order, and the plain stages between them: each step of a round is a process
of its own, and so are all plain stages that follow each other.

Nothing is remembered here: every step finds out itself what is done, so the same command after any interruption does
what is missing. A stage that is finished starts no process. Cost: starting Python three times per round, a few seconds
each where a step is done already.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import dropwhile, groupby, product

from shared.errors import UsageError
from shared.recipe.base import closest, quoted
from shared.recipe.recipe import Recipe, Stage
from tools.own_phase import run_phase
from tools.own_process import own_command

STEPS = ("answer", "score", "train")
"""Of a round, in their order."""


def with_rounds(recipe: Recipe, phases: Collection[str]) -> list[str]:
    """Return phases with the steps of rounds that training takes along: `["train"]` -> train, answer and score."""
    return [*phases, *(STEPS[:2] if "train" in phases and stages_with_rounds(recipe) else ())]


def stages_with_rounds(recipe: Recipe) -> list[Stage]:
    """Return the stages that have rounds."""
    return [stage for stage in recipe.stages if stage.rounds is not None]


def stage_of(recipe: Recipe, name: str | None) -> Stage:
    """Return the stage with rounds of that name, or the only one.

    Raises:
        UsageError: there is none, or there are several and none is named.
    """
    found = {stage.name: stage for stage in stages_with_rounds(recipe)}
    if not found:
        raise UsageError("no stage of the recipe has `rounds`; add the section to one")
    if name is None and len(found) > 1:
        raise UsageError(f"the stages {quoted(list(found))} have rounds; name one with --stage")
    if name is not None and name not in found:
        known = quoted(list(found))
        raise UsageError(f"--stage {name}: stages with rounds are {known}{closest(name, list(found))}")
    return found[name or next(iter(found))]


def train_in_processes(
    recipe: Recipe, stages: Sequence[Stage], again: Sequence[str], output: int | None = None
) -> None:
    """Train stages in their order, those with rounds step by step, in processes of their own.

    `again` are words of a command line that name the recipe, `output` is the descriptor of their output, None: ours.

    Raises:
        PhaseFailedError: a step failed.
    """
    from tools.rounds.finished import is_finished

    for _, stretch in groupby(stages, lambda stage: stage.name if stage.rounds else None):
        # What follows one that is trained now may begin with its weights: the process that trains knows if it is done.
        left = list(dropwhile(partial(is_finished, recipe), stretch))
        if left and left[0].rounds is not None:
            _rounds(left[0], range(1, left[0].rounds.count + 1), again, output)
        elif left:
            options = ("--from-stage", left[0].name, "--to-stage", left[-1].name)
            said = f"train {', '.join(stage.name for stage in left)}"
            run_phase(said, own_command("-m", "tools.cli", "train", *again, *options), output)


def rounds_in_processes(
    recipe: Recipe, stage: Stage, numbers: Sequence[int], again: Sequence[str], output: int | None = None
) -> None:
    """Do rounds of a stage; arguments and errors as for `train_in_processes`."""
    from tools.rounds.finished import is_finished

    if not is_finished(recipe, stage):
        _rounds(stage, numbers, again, output)


def _rounds(stage: Stage, numbers: Sequence[int], again: Sequence[str], output: int | None) -> None:
    for number, step in product(numbers, STEPS):
        options = ("--stage", stage.name, "--only", step, "--round", str(number))
        command = own_command("-m", "tools.cli", "rounds", *again, *options)
        run_phase(f"round {number} of {stage.name}, {step}", command, output)

"""Is everything of a stage done, with the settings that the recipe has now? Asked before processes are started for it.

The questions are those that the steps ask themselves; whatever one of them would refuse counts as not done, so that the
step says it. No model is loaded. Cost: samples of the models' weights, a tokenizer, the records of the caches, a pass
over the round's answers.
"""

from __future__ import annotations

from shared.errors import DecantError
from shared.recipe.recipe import Recipe, Stage
from shared.text.printable import say
from student_train.stage.stage_identity import lost_since
from tools.rounds.guards import beyond, round_figures
from tools.rounds.one_round import Round
from tools.rounds.publish import published_rounds
from tools.rounds.shares import shares_of


def is_finished(recipe: Recipe, stage: Stage) -> bool:
    """Tell whether a stage, and each of its rounds, is finished; say so where it is."""
    try:
        done = _is_trained(recipe, stage) if stage.rounds is None else _are_rounds_done(recipe, stage)
    except DecantError:
        return False
    if done:
        model = recipe.stage_dir(stage.name) / "model"
        said = f"train {stage.name}: finished before with the same settings, {model} is reused"
        say(said)
    return done


def _are_rounds_done(recipe: Recipe, stage: Stage) -> bool:
    assert stage.rounds is not None
    numbers = range(1, stage.rounds.count + 1)
    is_published = (
        published_rounds(recipe, stage) == stage.rounds.count and lost_since(recipe.stage_dir(stage.name)) is None
    )
    return is_published and all(_is_done(Round(recipe, stage, number)) for number in numbers)


def _is_done(one: Round) -> bool:
    """Tell whether a round is answered, scored (else its training has no targets to read) and trained."""
    from teacher_cache.student_answers import is_answered

    if one.found_job() is None or not is_answered(one.answering(), one.recipe.cache[0], one.asking):
        return False
    return beyond(round_figures(one), one.settings.guards) is None and is_trained(one)


def is_trained(one: Round) -> bool:
    """Tell whether a round was trained as the recipe says; the own cache may have got answers of later rounds since.

    Raises:
        DecantError: its stage cannot be planned.
    """
    from student_train.stage.stage_identity import finished_before_it_grew
    from student_train.stage.stage_work import resolve_stage

    recipe = one.training(shares_of(one))
    return finished_before_it_grew(resolve_stage(recipe, recipe.stage(one.training_name)))


def _is_trained(recipe: Recipe, stage: Stage) -> bool:
    from student_train.stage.stage_identity import claim_stage
    from student_train.stage.stage_work import resolve_stage

    if not (recipe.stage_dir(stage.name) / "done.json").is_file():
        return False
    return claim_stage(resolve_stage(recipe, stage))

"""The three steps of a round: the student answers, the teacher scores, the stage trains.

Each is run by a process of its own, so that no model shares a GPU with another, or on another machine, and each
continues where it was killed. Before anything is trained, and as soon as the answers are there, their guards are asked.
Cost: that of a build, and of a stage.
"""

from __future__ import annotations

from typing import Any

from shared.errors import DecantError
from shared.progress import BuildProgress
from shared.text.printable import say
from tools.rounds.guards import AnswerFigures, beyond, round_figures
from tools.rounds.one_round import Round, as_answering
from tools.rounds.publish import publish, require_of_rounds
from tools.rounds.shares import shares_of

Result = tuple[Any, str]
"""What --json prints, and what people see."""


class GuardError(DecantError):
    """A round's answers are beyond the recipe's bounds, so it is not trained on."""


def answer(one: Round) -> Result:
    """Let the student answer the round's prompts, and judge the answers.

    Raises:
        GuardError: they are beyond the bounds.
        TrainingError: the stage was trained without rounds before.
        DecantError: whatever stops a build.
    """
    from teacher_cache.prompts.problems import THRESHOLD
    from teacher_cache.student_answers import answer_prompts

    require_of_rounds(one)
    phase, accepted = f"answer.{one.stage.name}", THRESHOLD if one.settings.sources else 1.0
    with BuildProgress() as progress:
        _, summary = answer_prompts(one.answering(), one.recipe.cache[0], one.asking, progress, phase, accepted)
    figures = require_sound(one)
    lines = [*summary.notes, *summary.set_aside_lines(), f"{_name(one)}: {figures.text()}"]
    return {"cache": str(one.own_cache), "generated": summary.generated.rows, **figures.document}, "\n".join(lines)


def score(one: Round) -> Result:
    """Let the teacher score every answer of the own cache that it has not scored.

    Raises:
        IdentityError: the recipe's cache was scored by another teacher.
        DecantError: whatever stops a build.
    """
    from teacher_cache.build import teach
    from teacher_cache.teacher.teacher_identity import require_same_teacher

    one.job()
    if one.settings.teacher == "same":
        require_same_teacher(one.recipe)
    with BuildProgress() as progress:
        summary = teach(one.scoring(), None, progress, seconds_under=f"score.{one.stage.name}")
    made = summary.scored
    done = (
        f"scored {made.rows:,} answers, {made.positions:,} positions" if made.rows else "all answers were scored before"
    )
    text = f"{_name(one)}: {done}, in layer {summary.layer}"
    return {"cache": str(one.own_cache), "layer": summary.layer, "scored": made.rows}, text


def train(one: Round) -> Result:
    """Train the round, and put its model where the stage's is looked for.

    Raises:
        GuardError: its answers are beyond the bounds.
        DecantError: training cannot start or must stop.
    """
    from student_train.fit.allocator import expand_segments

    expand_segments()
    from student_train.stage.stages import run_stages
    from tools.rounds.finished import is_trained

    require_of_rounds(one)
    require_sound(one)
    if is_trained(one):
        say(f"{_name(one)}: trained before, {one.directory / 'model'} is reused")
    else:
        name = one.training_name
        run_stages(one.training(shares_of(one)), name, name)
    model = publish(one)
    return {"model": str(model)}, f"{_name(one)}: {model}"


def require_sound(one: Round) -> AnswerFigures:
    """Return the figures of a round's answers, once they keep within the bounds.

    Raises:
        GuardError: they do not; the stage's health.json says it too.
    """
    found = round_figures(one)
    problem = beyond(found, one.settings.guards)
    if problem is None:
        return found
    publish(one, stopped=problem)
    raise GuardError(
        f"{_name(one)} is not trained: {problem} ({found.text()}); the last good model is the one that answered, "
        f"{as_answering(one.recipe, one.start, None).model}; lower rounds.temperature or the learning rate, or move "
        "the bound"
    )


def _name(one: Round) -> str:
    return f"round {one.number} of {one.settings.count} of stage '{one.stage.name}'"

"""What is known to be wrong with rounds of own answers before any work: what is asked, and who scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from shared.recipe.base import Problem
from tools.plan.plan_prompts import require_prompts
from tools.plan.preflight.preflight_asked import Asked, said
from tools.plan.preflight.preflight_teach import teacher_problems
from tools.rounds.one_round import Round
from tools.rounds.shares import require_labels_of_its_own


def answer_problems(asked: Asked) -> Iterator[Problem]:
    """Check that the prompts of rounds are there, and the caches whose tokenizer the answers are written with."""
    from teacher_cache.prompts.files.prompt_files import locate

    for i, stage in enumerate(asked.recipe.stages):
        if stage.rounds is None:
            continue
        own = stage.rounds.sources
        if not own and not any(source.of_turns for source in asked.recipe.prompts):
            yield ("stages", i, "rounds"), "no entry of `prompts` asks anything; name some in `sources` here"
        yield from said(("stages", i, "rounds"), partial(require_labels_of_its_own, Round(asked.recipe, stage, 1)))
        missing: list[Problem] = []
        for j, source in enumerate(own or asked.recipe.prompts):
            place = ("stages", i, "rounds", "sources", j, "path") if own else ("prompts", j, "path")
            if not source.of_cache and not asked.elsewhere:
                missing += said(place, partial(locate, source))
        yield from missing
        if not missing and not asked.elsewhere:
            one = Round(asked.recipe, stage, 1)
            work = partial(require_prompts, one.asking_once(), one.asking)
            yield from said(("stages", i, "rounds", "prompts"), work)
        if not asked.caches and not asked.builds:
            yield ("cache", 0), f"there is no cache at '{asked.recipe.cache[0]}' yet; build it with `decant teach`"


def score_problems(asked: Asked) -> Iterator[Problem]:
    """Check the teacher that scores own answers: its files, its engine, and that it scored the recipe's caches."""
    from teacher_cache.teacher.teacher_identity import require_same_teacher

    with_rounds = [(i, stage.rounds) for i, stage in enumerate(asked.recipe.stages) if stage.rounds is not None]
    found = list(teacher_problems(asked)) if with_rounds and not asked.builds else []
    yield from found
    for i, rounds in with_rounds:
        if rounds.teacher == "same" and asked.caches and not asked.builds and not asked.plans_only and not found:
            yield from said(("stages", i, "rounds", "teacher"), lambda: require_same_teacher(asked.recipe))

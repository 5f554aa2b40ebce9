"""What is known to be wrong with rounds of own answers before any work: what is asked, and who scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from shared.recipe.base import Problem
from tools.plan.preflight.preflight_asked import Asked, Place, said, said_of_prompts
from tools.plan.preflight.preflight_teach import teacher_problems
from tools.rounds.one_round import Round
from tools.rounds.shares import require_labels_of_its_own


def answer_problems(asked: Asked) -> Iterator[Problem]:
    """Check that the prompts of rounds are there, and the caches whose tokenizer the answers are written with."""
    for i, stage in enumerate(asked.recipe.stages):
        if stage.rounds is None:
            continue
        own = stage.rounds.sources
        if not own and not any(source.of_turns for source in asked.recipe.prompts):
            yield ("stages", i, "rounds"), "no entry of `prompts` asks anything; name some in `sources` here"
        yield from said(("stages", i, "rounds"), partial(require_labels_of_its_own, Round(asked.recipe, stage, 1)))
        if not asked.elsewhere:
            one, at = Round(asked.recipe, stage, 1), ("stages", i, "rounds")
            listed_at: Place = (*at, "sources") if own else ("prompts",)
            listed = own or asked.recipe.prompts
            yield from said_of_prompts((*at, "prompts"), listed, listed_at, one.asking_once(), one.asking)
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

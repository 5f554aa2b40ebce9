"""What the rounds of a recipe's stages would add to a plan: the student's answers, and one scoring pass over them.

The prompts are those of the rounds; who answers is not known yet, so tokens are counted with the teacher's tokenizer,
which is the student's, and answers are expected as a build's are. Cost: one pass over the prompts per stage with
rounds; records of the own caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import PromptError
from shared.recipe.recipe import Recipe
from tools.plan.plan_bounds import BOUNDS, EXPECTED_SHARE_OF_MAX_NEW_TOKENS, sizes, span
from tools.plan.plan_existing import existing, target_bytes
from tools.plan.plan_prompts import PromptCount, count_prompts
from tools.rounds.chain import stages_with_rounds
from tools.rounds.one_round import Round


def rounds_figures(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return per stage with rounds what its rounds are still to answer and to score.

    Raises:
        PromptError: a source is missing, or a round is to ask more prompts than there are.
        CacheError: a cache cannot be read.
    """
    return {
        stage.name: _figures(Round(recipe, stage, 1))
        for stage in stages_with_rounds(recipe)
        if recipe.teacher is not None
    }


def _figures(one: Round) -> dict[str, Any]:
    answering = one.asking_once()
    assert answering.generate is not None
    prompts, prompt_tokens = _not_held_out(count_prompts(answering))
    try:
        asked = one.asking.number_of(prompts)
    except PromptError as error:
        raise PromptError(f"stage '{one.stage.name}': {error} (rounds.prompts)") from None
    answered = sum(
        Round(one.recipe, one.stage, number).found_job() is not None for number in range(1, one.settings.count + 1)
    )
    to_do = (one.settings.count - answered) * asked * one.settings.samples_per_prompt
    there = existing(one.scoring(), [])
    most = to_do * answering.generate.max_new_tokens
    answers = {"expected": round(EXPECTED_SHARE_OF_MAX_NEW_TOKENS * most), "at_most": most}
    read = round(to_do * prompt_tokens / max(prompts, 1))
    new = {bound: read + answers[bound] for bound in BOUNDS}
    score = {bound: there["unscored_tokens"] + new[bound] for bound in BOUNDS}
    positions = {bound: there["unscored_positions"] + answers[bound] for bound in BOUNDS}
    return {
        "rounds": one.settings.count,
        "rounds_answered": answered,
        "prompts_per_round": asked,
        "answers_to_do": to_do,
        "generate_tokens": answers,
        "score_tokens": score,
        "positions": positions,
        "bytes": target_bytes(one.recipe, there, positions, new),
        "row_tokens": there["tokens"] + read + answers["expected"],
    }


def _not_held_out(counted: PromptCount) -> tuple[int, int]:
    """Return prompts that may be asked, and their tokens."""
    prompts = sum(source.rows - source.rows_heldout for source in counted.sources.values())
    tokens = sum(
        source.prompt_tokens_counted / max(source.rows_counted, 1) * (source.rows - source.rows_heldout)
        for source in counted.sources.values()
    )
    return prompts, round(tokens)


def rounds_lines(figures: Mapping[str, Any]) -> list[str]:
    """Lay the figures out for people."""
    lines = []
    for name, of in figures.items():
        done = f", {of['rounds_answered']:,} of them answered" if of["rounds_answered"] else ""
        lines.append(
            f"  rounds {name}: {of['rounds']:,} rounds of {of['prompts_per_round']:,} prompts each{done}, "
            f"{of['answers_to_do']:,} answers to do"
        )
        if of["answers_to_do"]:
            lines.append(f"    generate {span(of['generate_tokens'])} tokens, by the student")
        if of["score_tokens"]["at_most"]:
            lines.append(f"    score    {span(of['score_tokens'])} tokens, {span(of['positions'])} positions")
            lines.append(f"    disk     {sizes(of['bytes'])}")
    return lines

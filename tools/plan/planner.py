"""`decant plan`: rows, tokens and gigabytes of a recipe before anything runs, with every assumption stated.

Rows and prompt tokens are counted; answers that do not exist are bounded by `max_new_tokens` and expected at half of
it; bytes per position are measured where the cache has such a layer and assumed otherwise. Hours are given only where
an earlier build of the same run measured a rate: a guess about an unknown machine would be worse than none.
"""

from __future__ import annotations

from pathlib import Path
from shutil import disk_usage
from typing import Any

from shared.cache.rows_left_out import answers_line
from shared.errors import DamagedError, UsageError
from shared.models.gpus import offered_gpus
from shared.recipe.recipe import Recipe
from shared.seconds import read_seconds
from student_train.fit.precision import precision_notes
from teacher_cache.prompts.problems import THRESHOLD, accepting, too_many
from tools.cache.cache_commands import size
from tools.evaluate.tasks.contamination import among_groups, by_task, sentence
from tools.plan.plan_bounds import (
    BOUNDS,
    EXPECTED_SHARE_OF_MAX_NEW_TOKENS,
    NOTHING,
    sizes,
    span,
)
from tools.plan.plan_existing import bytes_assumption, existing, target_bytes
from tools.plan.plan_hidden import hidden_figures, hidden_lines
from tools.plan.plan_lengths import length_figures, length_line, row_lengths
from tools.plan.plan_prompts import CHARACTERS_PER_TOKEN, ROWS_COUNTED, PromptCount, SourceCount, count_prompts
from tools.plan.plan_rounds import rounds_figures, rounds_lines
from tools.plan.plan_steps import stage_figures, step_line
from tools.plan.plan_teachers import shorter_teachers, teachers_figures, teachers_lines


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe would do, as plain data.

    Raises:
        PromptError: prompts cannot be read.
        CacheError: the cache cannot be read.
    """
    assumptions: list[str] = []
    there = existing(recipe, assumptions)
    result: dict[str, Any] = {"name": recipe.name, "cache": there, "assumptions": assumptions, "sources": {}}
    if recipe.prompts:
        counted = count_prompts(recipe)
        result["tasks"] = by_task(recipe, lambda task: among_groups(recipe, task, counted.groups))
        result |= _build_figures(recipe, counted, there, result["assumptions"])
    if recipe.teacher is not None and there["unscored_tokens"]:
        result["rescore"] = _rescore_figures(recipe, there)
    if "bytes" in result or "rescore" in result:
        assumptions.append(bytes_assumption(recipe, there))
        if None in (result.get("rescore", {}).get("hours", 0.0), result.get("hours", 0.0)):
            assumptions.append("hours are not given: no build of this run has measured a rate on this machine yet")
    there["other_answers"] = answers_line(recipe)
    hidden = hidden_figures(recipe, result.get("rows_to_do", 0), result.get("positions", NOTHING), assumptions)
    if hidden is not None:
        result["hidden"] = hidden
    if recipe.teachers:
        result["teachers"] = teachers_figures(recipe, result)
        assumptions += shorter_teachers(recipe)
    rounds = rounds_figures(recipe)
    if rounds:
        result["rounds"] = rounds
        share = f"{EXPECTED_SHARE_OF_MAX_NEW_TOKENS:.0%}"
        assumptions.append(f"the student's answers are expected at {share} of max_new_tokens, and at most all of it")
    result["stages"] = {
        stage.name: stage_figures(recipe, stage, result, rounds.get(stage.name)) for stage in recipe.stages
    }
    if any(figures["estimated"] for figures in result["stages"].values()):
        assumptions.append(
            "steps of stages without max_steps are those of full packs, which are counted once the rows are there"
        )
    if recipe.stages:
        lengths, longest, on_gpu = row_lengths(recipe), _longest_to_come(recipe, result), bool(offered_gpus())
        for stage in recipe.stages:
            result["stages"][stage.name]["lengths"] = length_figures(recipe, stage, lengths, longest)
            notes = precision_notes(stage, recipe.student, on_gpu=on_gpu) if recipe.student else []
            result["stages"][stage.name]["precision"] = notes
    return result


def _longest_to_come(recipe: Recipe, result: dict[str, Any]) -> int:
    """Return the tokens of the longest row, at most, that a build would add, of those counted; 0 for none."""
    to_do = [source for source in result["sources"].values() if source["rows"] > source["rows_in_cache"]]
    answer = recipe.generate.max_new_tokens if recipe.generate is not None else 0
    longest = max((source["longest_tokens"] + answer for source in to_do), default=0)
    most = recipe.teacher.max_model_len if recipe.teacher is not None else None
    return longest if most is None else min(longest, most)


def _max_set_aside(unusable: int, usable: int) -> float | None:
    """Return the share of unusable rows that a build has to accept; None where it accepts them anyway."""
    rows = unusable + usable
    return accepting(unusable, rows) if too_many(unusable, rows) else None


def _build_figures(
    recipe: Recipe, counted: PromptCount, there: dict[str, Any], assumptions: list[str]
) -> dict[str, Any]:
    """Return rows, tokens, bytes and, where a rate is known, hours of phase 1."""
    sources = {name: _source_figures(recipe, source) for name, source in counted.sources.items()}
    prompt = sum(figures["prompt_tokens"] for figures in sources.values())
    answers = {bound: sum(figures["answer_tokens"][bound] for figures in sources.values()) for bound in BOUNDS}
    assumptions += counted.assumed
    if recipe.generate is not None and any(source.answer_tokens_assumed is None for source in counted.sources.values()):
        half = f"{EXPECTED_SHARE_OF_MAX_NEW_TOKENS:.0%} of max_new_tokens ({recipe.generate.max_new_tokens})"
        assumptions.append(f"answers are expected at {half}, and at most all of it")
    if counted.tokenizer_note:
        assumptions.append(
            f"tokens are estimated at {CHARACTERS_PER_TOKEN:g} characters each: {counted.tokenizer_note}"
        )
    counted_rows = [source for source in counted.sources.values() if source.answer_tokens_assumed is None]
    if any(source.rows > source.rows_counted for source in counted_rows):
        assumptions.append(f"tokens are counted for {ROWS_COUNTED:,} rows per source and scaled up for the rest")
    rows = sum(figures["rows"] - figures["rows_in_cache"] for figures in sources.values())
    if counted.set_aside and not any(figures["rows"] for figures in sources.values()):
        raise UsageError(f"none of {counted.set_aside:,} prompts can be used, the first: {counted.first_problem}")
    score = {bound: prompt + answers[bound] for bound in BOUNDS}
    return {
        "sources": sources,
        "set_aside": counted.set_aside,
        "max_set_aside": _max_set_aside(counted.set_aside, sum(figures["rows"] for figures in sources.values())),
        "first_problem": counted.first_problem,
        "rows_to_do": rows,
        "units": -(-rows // recipe.rows_per_part),
        "generate_tokens": answers if recipe.generate is not None else None,
        "score_tokens": score,
        "positions": answers,
        "bytes": target_bytes(recipe, there, answers, score),
        "hours": _hours(recipe, there, score["expected"]),
    }


def _rescore_figures(recipe: Recipe, there: dict[str, Any]) -> dict[str, Any]:
    """Return tokens, bytes and, where a rate is known, hours of scoring rows that are there for a new layer."""
    positions = there["unscored_positions"]
    return {
        "tokens": there["unscored_tokens"],
        "positions": positions,
        "bytes": target_bytes(recipe, there, dict.fromkeys(BOUNDS, positions)),
        "hours": _hours(recipe, there, there["unscored_tokens"]),
    }


def _source_figures(recipe: Recipe, source: SourceCount) -> dict[str, Any]:
    to_do = source.rows - source.rows_in_cache
    if recipe.generate is None:
        answers = dict.fromkeys(BOUNDS, source.scaled(source.answer_tokens_counted))
    else:
        most = to_do * recipe.generate.max_new_tokens
        assumed = source.answer_tokens_assumed
        expected = most * EXPECTED_SHARE_OF_MAX_NEW_TOKENS if assumed is None else min(assumed * to_do, most)
        answers = {"expected": round(expected), "at_most": most}
    return {
        "rows": source.rows,
        "rows_in_cache": source.rows_in_cache,
        "duplicates": source.duplicates,
        "too_long": source.too_long,
        "prompt_tokens": source.scaled(source.prompt_tokens_counted),
        "longest_tokens": source.longest_tokens,
        "answer_tokens": answers,
    }


def _hours(recipe: Recipe, there: dict[str, Any], tokens: int) -> float | None:
    """Return hours of phase 1 at the rate that this run's earlier builds measured, or None.

    Their seconds hold answering and scoring together, so for scoring alone they are a bound.
    """
    try:
        seconds = read_seconds(recipe.output_dir).get("teach", 0.0)
    except DamagedError:
        return None
    return tokens / there["tokens"] * seconds / 3600 if there["tokens"] and seconds > 0 else None


def require_disk(recipe: Recipe, result: dict[str, Any]) -> None:
    """Refuse a plan whose cache would not fit its disk.

    Raises:
        UsageError: with what is expected and what is free.
    """
    needed = result.get("bytes", {}).get("expected", 0)
    needed += result.get("rescore", {}).get("bytes", {}).get("expected", 0)
    needed += sum(figures["bytes"]["expected"] for figures in result.get("teachers", {}).values())
    _require_room(recipe.cache[0].absolute(), needed, "the cache needs", "`cache`")
    own = sum(figures["bytes"]["expected"] for figures in result.get("rounds", {}).values())
    _require_room(recipe.output_dir.absolute(), own, "own answers of the rounds need", "`output_dir`")


def _require_room(place: Path, needed: int, what: str, setting: str) -> None:
    """Refuse what would not fit its disk."""
    free = disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
    if needed > free:
        raise UsageError(
            f"{what} about {size(needed)} in {place} and {size(free)} are free; make room, set {setting} to a "
            "larger disk, or keep less (capture.k, capture.mass)"
        )


def plan_text(result: dict[str, Any]) -> str:
    """Lay a plan out for people."""
    lines = [f"plan of {result['name']}"]
    there = result["cache"]
    if there["rows"]:
        lines.append(
            f"  there already: {there['rows']:,} rows, {there['tokens']:,} tokens, {there['positions']:,} positions"
        )
    lines += [f"  {there['other_answers']}"] if there["other_answers"] else []
    for name, source in result["sources"].items():
        extra = f", {source['rows_in_cache']:,} of them in the cache" if source["rows_in_cache"] else ""
        extra += f", {source['duplicates']:,} duplicates left out" if source["duplicates"] else ""
        extra += f", {source['too_long']:,} too long and set aside" if source.get("too_long") else ""
        lines.append(
            f"  source {name}: {source['rows']:,} rows{extra}, {source['prompt_tokens']:,} prompt tokens to do"
        )
    if "rows_to_do" in result:
        if result["set_aside"]:
            lines.append(f"  {result['set_aside']:,} rows cannot be used, the first: {result['first_problem']}")
        if result["max_set_aside"]:
            way = f"correct or remove them, or go on without them by --max-set-aside {result['max_set_aside']:g}"
            lines.append(f"    more than the {THRESHOLD:.0%} that are set aside: {way}")
        lines.append(f"  teach: {result['rows_to_do']:,} rows to do in {result['units']:,} units")
        if result["generate_tokens"]:
            lines.append(f"    generate {span(result['generate_tokens'])} tokens")
        lines.append(f"    score    {span(result['score_tokens'])} tokens, {span(result['positions'])} positions")
        lines.append(f"    disk     {sizes(result['bytes'])}")
        if result["hours"] is not None:
            lines.append(f"    time     {result['hours']:.2g} hours at the rate of this run's earlier build")
    if "rescore" in result:
        again = result["rescore"]
        lines.append(
            f"  teach: score {again['tokens']:,} tokens, {again['positions']:,} positions that this capture lacks"
        )
        lines.append(f"    disk     {sizes(again['bytes'])}")
        if again["hours"] is not None:
            bound = "at most " if result.get("generate_tokens") else ""
            lines.append(f"    time     {bound}{again['hours']:.2g} hours at the rate of this run's earlier build")
    if "hidden" in result:
        lines += hidden_lines(result["hidden"])
    lines += teachers_lines(result.get("teachers", {}))
    lines += rounds_lines(result.get("rounds", {}))
    for domain, counts in result.get("tasks", {}).items():
        said = sentence(domain, counts)
        lines += [f"  task {said}: its score will say little about others"] if said else []
    for name, stage in result["stages"].items():
        lines.append(step_line(name, stage))
        line = length_line(name, stage["lengths"])
        lines += [line] if line else []
        lines += [f"  train {name}: {note}" for note in stage["precision"]]
    lines += [f"  assumed: {assumption}" for assumption in result["assumptions"]]
    return "\n".join(lines)

"""`decant run`: teach, train, eval, report, one process per phase, so that no phase keeps another's memory or GPU.

A phase that the recipe has nothing for (no teacher, no stages, no models to compare) is left out and said so. Each
phase continues what is there and measures its own seconds (seconds.json), so running everything again is quick and
changes no figure.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

from shared.errors import UsageError
from shared.recipe.recipe import Recipe
from shared.text.printable import say
from tools.cli_parser import PHASES
from tools.own_phase import recipe_words, run_phase
from tools.own_process import own_command


def run_all(recipe: Recipe, args: argparse.Namespace) -> None:
    """Run the chosen phases of a recipe in order.

    Raises:
        UsageError: --only, --from and --to contradict each other.
        PhaseFailedError: a phase failed.
    """
    chosen = chosen_phases(args.first, args.last, args.only)
    for phase in chosen:
        reason = None if args.only else nothing_to_do(recipe, phase)
        if reason is not None:
            say(f"{phase}: left out, {reason}")
            continue
        superseded = phase == "eval" and "report" in chosen  # its table is the report's
        output = subprocess.DEVNULL if superseded else sys.stderr.fileno() if args.json and phase != "report" else None
        run_phase(phase, phase_command(phase, recipe, args), output)


def chosen_phases(first: str | None, last: str | None, only: str | None) -> tuple[str, ...]:
    """Return the phases from `first` to `last`, or only one.

    Raises:
        UsageError: the three contradict each other.
    """
    if only is not None:
        if first is not None or last is not None:
            raise UsageError("--only stands alone; leave out --from and --to")
        return (only,)
    begin = PHASES.index(first) if first else 0
    end = PHASES.index(last) if last else len(PHASES) - 1
    if begin > end:
        raise UsageError(f"--from {first} comes after --to {last}; the order is {', '.join(PHASES)}")
    return PHASES[begin : end + 1]


def phases_of(recipe: Recipe, args: argparse.Namespace | None = None) -> list[str]:
    """Return the phases that a recipe has something for, of those that a command line chooses."""
    chosen = chosen_phases(args.first, args.last, args.only) if args is not None else PHASES
    return [phase for phase in chosen if nothing_to_do(recipe, phase) is None]


def nothing_to_do(recipe: Recipe, phase: str) -> str | None:
    """Say why a recipe has nothing for a phase, or None where it has."""
    if phase == "teach" and recipe.teacher is None:
        return "the recipe has no `teacher` and reuses its cache"
    if phase == "teach" and len(recipe.cache) > 1:
        return "the recipe reuses several caches"
    if phase == "train" and not recipe.stages:
        return "the recipe has no `stages`"
    if phase == "eval" and not recipe.evaluate.models:
        return "`evaluate.models` is empty"
    return None


def and_next(text: str, done: str, recipe: Recipe, args: argparse.Namespace, more: Sequence[str] = ()) -> str:
    """Return what a command says with the command that comes after it; `run` goes on by itself, a part has others."""
    parts = ("partition", "layer", "from_stage", "to_stage", "lm_eval")
    if args.checked or any(getattr(args, part, None) for part in parts):
        return text
    words = [str(args.recipe), *(part for override in args.overrides for part in ("--set", override))]
    rest = PHASES[PHASES.index(done) + 1 :] if done in PHASES else ("run",)
    following = next((phase for phase in rest if nothing_to_do(recipe, phase) is None), "report")
    words = [str(recipe.output_dir)] if following == "report" else [*words, *more]
    return f"{text}\nnext: decant {following} {shlex.join(words)}"


def phase_command(phase: str, recipe: Recipe, args: argparse.Namespace) -> list[str]:
    """Return the command line of one phase in a process of its own."""
    command = own_command("-m", "tools.cli", phase)
    if phase == "report":
        command.append(str(recipe.output_dir))
        command += ["--json"] if args.json else []
        return [*command, "--verbose"] if args.verbose else command
    command += recipe_words(args)
    if phase == "eval" and args.allow_unsafe_code:
        command.append("--allow-unsafe-code")
    if phase == "teach" and args.max_set_aside is not None:
        command += ["--max-set-aside", repr(args.max_set_aside)]
    return command

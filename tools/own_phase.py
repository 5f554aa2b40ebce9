"""A phase in a process of its own: nothing of one phase stays in memory or on a GPU while the next one works.

Cost: starting Python.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from shared.errors import DecantError
from shared.process.parent_watch import announced
from shared.text.printable import say
from tools.own_process import own_environment

if TYPE_CHECKING:
    from shared.recipe.recipe import Recipe


def recipe_words(args: argparse.Namespace) -> list[str]:
    """Return the words that name a command's recipe, which it has checked, to another process, from its options
    `recipe`, `overrides` and `verbose`: `["r.yaml", "--set", "seed=3", "--checked"]`.
    """
    words = [str(args.recipe), *(part for override in args.overrides for part in ("--set", override)), "--checked"]
    return [*words, "--verbose"] if args.verbose else words


def save_recipe(recipe: Recipe) -> Path:
    """Write a recipe where its run is, for a report and for other processes to read; return the file."""
    from shared.atomic import make_dir, write_atomic
    from shared.recipe.file import dump_recipe

    make_dir(recipe.output_dir)
    path = recipe.output_dir / "recipe.yaml"
    write_atomic(path, dump_recipe(recipe).encode(), "recipe")
    return path


INTERRUPTED_SECONDS = 5.0
"""A phase may end by itself after Ctrl-C, which its terminal sends to both, for so long."""
TERMINATED_SECONDS = 1.0
"""And after SIGTERM, which a batch system may send to both."""
SAID_WITH = (130, 143)
"""Exit codes of a phase that was stopped and has said so."""


class PhaseFailedError(DecantError):
    """A phase ended with an exit code other than 0; its own message stands above."""


class PhaseRefusedError(PhaseFailedError):
    """A phase was asked for what is wrong."""

    exit_code: ClassVar[int] = 2


def run_phase(phase: str, command: Sequence[str], output: int | None) -> None:
    """Say that a phase begins and run it to its end, its output going to a file descriptor or, for None, to ours; stop
    it where we are stopped.

    Raises:
        PhaseFailedError: it failed.
    """
    say(f"{phase}: begins")
    with announced():  # a phase ends with the run, also after kill -9
        process = subprocess.Popen(command, env=own_environment(), stdout=output)  # noqa: S603 - our own interpreter
    try:
        code = process.wait()
    except BaseException as error:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have got the signal, too; a second cuts it short
            process.wait(timeout=INTERRUPTED_SECONDS if isinstance(error, KeyboardInterrupt) else TERMINATED_SECONDS)
        if process.poll() is None:
            process.terminate()
        if process.wait() in SAID_WITH:
            error.said = True  # type: ignore[attr-defined]
        raise
    if code < 0:
        hint = "; the machine may have run out of memory" if code == -9 else ""
        raise PhaseFailedError(
            f"phase {phase} was killed by signal {-code}{hint}; the same command continues where it stopped"
        )
    if code:
        failed = PhaseRefusedError if code == PhaseRefusedError.exit_code else PhaseFailedError
        raise failed(f"phase {phase} ended with exit code {code}; its message stands above")

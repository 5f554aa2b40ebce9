"""The command line: options in, one function per command, exit codes out; nothing but wiring.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted, 143 terminated. An error that a user can meet is
one line without a traceback; anything else is a bug of Decant, named as such, with its traceback in a file. Everything
heavy is imported by the command that needs it, so that `decant --help` loads neither torch nor vllm, transformers or
datasets.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tools.own_process import end_at_interrupt

    end_at_interrupt()

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from shared.errors import DecantError, is_panic, on_one_line, reason_of, refused
from shared.places import with_urls
from shared.text.printable import PrintableFormatter, printable, say
from tools.cli_cache_parser import CACHE_COMMANDS
from tools.cli_parser import build_parser
from tools.cli_values import EXIT_USAGE

if TYPE_CHECKING:
    from tools.cache.cache_commands import Answer

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143
TERMINATED = "terminated by SIGTERM; the same command continues where it stopped"
DEFERRED_SECONDS = 0.05
"""A signal that comes where it would be lost is sent again after so long."""
IMPORT_SECONDS = 1.5
"""SIGTERM waits so long for an import to end; those of a busy machine take half a minute."""
_DEFERRED: set[int] = set()
"""Signals to send again."""
_terminated_at: float | None = None
"""When SIGTERM first came within an import."""


PhasesOf = Callable[[argparse.Namespace, Any], Collection[str]]
"""Phases of a recipe that a command will run."""


class Terminated(BaseException):
    """SIGTERM came; unwinds like KeyboardInterrupt, so that files and processes are closed."""


_STARTERS = (("teacher", "teacher"), ("student", "student"), ("prompts", "prompts.jsonl"))
"""What a starter names where the command line does not."""


def _init(args: argparse.Namespace) -> Answer:
    import shlex

    if args.cache is not None:
        from shared.errors import UsageError

        given = [name for name in ("teacher", "prompts") if getattr(args, name) is not None]
        if given or args.student is None:
            said = f"leave --{given[0]} out" if given else "name the student's directory with --student"
            raise UsageError(f"--cache trains from what is in the cache, without a teacher; {said}")
        from tools.init_from_cache import init_from_cache

        path = init_from_cache(args.name, args.cache, args.student, args.output)
        return {"recipe": str(path)}, f"wrote {path}; next: decant run {shlex.quote(str(path))}"
    from tools.init_recipe import init_recipe

    teacher, student, prompts = (getattr(args, name) or f"path/to/{file}" for name, file in _STARTERS)
    path = init_recipe(args.name, teacher, student, prompts, args.output)
    return {"recipe": str(path)}, f"wrote {path}; next: decant plan {shlex.quote(str(path))}"


def _plan(args: argparse.Namespace) -> Answer:
    from tools.plan.planner import plan, plan_text, require_disk
    from tools.rounds.chain import with_rounds
    from tools.run_all import and_next, phases_of

    if args.card is not None and (args.calibrate is not None or args.price_per_hour is not None):
        args.parser.error("--card is about training and --calibrate about the teacher; ask one at a time")
    if args.price_per_hour is not None and args.calibrate is None:
        args.parser.error("--price-per-hour needs --calibrate: without it no hours are known")
    # A card asks for sizes alone.
    recipe = _load(args, lambda args, recipe: () if args.card else with_rounds(recipe, phases_of(recipe)))
    if args.calibrate is not None:
        from tools.phases import plan_calibrated

        return plan_calibrated(recipe, args.calibrate, args.price_per_hour)
    if args.card is None:
        result = plan(recipe)
        require_disk(recipe, result)
        share = result.get("max_set_aside")
        accepting = ["--max-set-aside", f"{share:g}"] if share else []
        return result, and_next(plan_text(result), "plan", recipe, args, accepting)
    from tools.plan.plan_card import card_text, plan_card, read_cards

    fit = plan_card(recipe, read_cards(args.card))
    return fit, card_text(fit)


def _teach(args: argparse.Namespace) -> Answer:
    from tools.phases import teach
    from tools.run_all import and_next

    recipe = _load(args, lambda *_: ("teach",), save=True)
    result, text = teach(recipe, args.partition, args.max_set_aside, args.layer)
    return result, and_next(text, "teach", recipe, args)


def _train(args: argparse.Namespace) -> Answer:
    from tools.own_phase import recipe_words
    from tools.phases import train
    from tools.rounds.chain import with_rounds
    from tools.run_all import and_next

    def phases(args: argparse.Namespace, recipe: Any) -> Collection[str]:
        recipe.stages_between(args.from_stage, args.to_stage)
        return with_rounds(recipe, ("train",))

    recipe = _load(args, phases, save=True)
    result, text = train(recipe, args.from_stage, args.to_stage, recipe_words(args))
    return result, and_next(text, "train", recipe, args)


def _rounds(args: argparse.Namespace) -> Answer:
    from tools.own_phase import recipe_words
    from tools.phases import rounds
    from tools.rounds.chain import STEPS

    recipe = _load(args, lambda *_: (args.only,) if args.only else STEPS, save=True)
    return rounds(recipe, args.stage, args.only, args.round, recipe_words(args))


def _eval(args: argparse.Namespace) -> Answer:
    from tools.phases import evaluate
    from tools.run_all import and_next

    recipe = _load(args, lambda *_: ("eval",), save=True)
    result, text = evaluate(recipe, args.allow_unsafe_code, args.lm_eval)
    return result, and_next(text, "eval", recipe, args)


def _run(args: argparse.Namespace) -> int:
    from tools.rounds.chain import with_rounds
    from tools.run_all import phases_of, run_all

    with _stdout_kept(args):
        recipe = _load(args, lambda args, recipe: with_rounds(recipe, phases_of(recipe, args)), save=True)
    run_all(recipe, args)
    return 0


def _report(args: argparse.Namespace) -> Answer:
    from tools.phases import report

    return report(args.runs, args.output)


def _schema(args: argparse.Namespace) -> int:
    from tools.recipe_page import page, schema_text

    print(page() if args.page else schema_text(), end="")
    return 0


def _export(args: argparse.Namespace) -> Answer:
    from tools.export.export_run import export_run

    result, text = export_run(args.run, args.stage, args.output, keep_adapter=args.keep_adapter, dtype=args.dtype)
    if args.push is not None:
        from shared.remote.hub import push_model

        result["pushed"] = push_model(Path(result["model"]), args.push)
        text += f"\n  pushed to:   {result['pushed']}"
    return result, text


def _cache(args: argparse.Namespace) -> Answer:
    if args.cache_command is None:
        *names, last = CACHE_COMMANDS.names
        args.parser.error(f"name what to do with the cache: {', '.join(names)} or {last}")
    from tools.cache.cache_commands import run_cache_command

    return run_cache_command(args)


def _doctor(args: argparse.Namespace) -> Answer:
    from tools.doctor.doctor import examine, text

    checks = examine()
    failed = any(check.required and not check.passed for check in checks)
    return [check._asdict() for check in checks], text(checks), EXIT_FAILED if failed else 0


def _answered(command: Callable[[argparse.Namespace], Answer]) -> Callable[[argparse.Namespace], int]:
    """Return a command that prints its answer, whatever libraries print before."""

    def run(args: argparse.Namespace) -> int:
        with _stdout_kept(args):
            document, text, *code = command(args)
        print(with_urls(json.dumps(document, indent=2, default=str) if args.json else printable(text)), flush=True)
        return code[0] if code else 0

    return run


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": _answered(_init),
    "plan": _answered(_plan),
    "teach": _answered(_teach),
    "train": _answered(_train),
    "rounds": _answered(_rounds),
    "eval": _answered(_eval),
    "run": _run,
    "report": _answered(_report),
    "schema": _schema,
    "export": _answered(_export),
    "cache": _answered(_cache),
    "doctor": _answered(_doctor),
}


def _load(args: argparse.Namespace, phases: PhasesOf | None = None, *, save: bool = False) -> Any:
    """Load the recipe, check what `phases` need, remember its run directory for a traceback, and save what runs there.

    A command that another one started leaves the checks to that one. A command saves what it runs; one that only plans
    may do without models whose sizes the recipe states.
    """
    from shared.recipe.file import load_recipe_and_places

    recipe, where = load_recipe_and_places(args.recipe, args.overrides)
    if phases is not None and not args.checked:
        from tools.plan.preflight.checks import preflight

        preflight(recipe, where, phases(args, recipe), plans_only=not save)
    args.run_dir = recipe.output_dir
    if save:
        from tools.own_phase import save_recipe

        save_recipe(recipe)
    return recipe


@contextlib.contextmanager
def _stdout_kept(args: argparse.Namespace) -> Iterator[None]:
    """Send whatever libraries print to standard error while a program waits for JSON alone."""
    if not args.json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Raise `Terminated`, but not within an import, where a library may swallow it or be left half imported; after one
    of more than `IMPORT_SECONDS` leave as at kill -9, at which nothing that is written is lost and children end.
    """
    global _terminated_at
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _terminated_at = _terminated_at or time.monotonic()
            if time.monotonic() - _terminated_at > IMPORT_SECONDS:
                _complain(TERMINATED)
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                os._exit(EXIT_TERMINATED)
            _defer(signal.SIGTERM)
            return
        frame = frame.f_back
    _terminated_at = None
    raise Terminated


def _defer(number: int) -> None:
    _DEFERRED.add(number)
    signal.setitimer(signal.ITIMER_REAL, DEFERRED_SECONDS)


def _send_deferred(_number: int, _frame: FrameType | None) -> None:
    for number in sorted(_DEFERRED):
        _DEFERRED.discard(number)
        os.kill(os.getpid(), number)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Send the signal again that an object's finaliser swallowed; leave anything else to Python."""
    number = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(found.exc_type)
    if number is None:
        sys.__unraisablehook__(found)
    else:
        _defer(number)


def _prepare(verbose: bool) -> None:
    """Turn SIGTERM into an exception of this process alone, and quieten libraries before they are imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of `end_at_interrupt`, or of `decant_entry`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGALRM, _send_deferred)
    sys.unraisablehook = _unraisable
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _report_bug(error: Exception, args: argparse.Namespace) -> None:
    """Name an unexpected exception as a bug, in one line, and say where its traceback is."""
    if args.verbose:
        traceback.print_exception(error)
        where = "above"
    else:
        try:
            directory = getattr(args, "run_dir", None)
            directory = directory if directory is not None and directory.is_dir() else Path(tempfile.gettempdir())
            path = directory / f"decant-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            own = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # no link that somebody laid there
            with os.fdopen(own, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(traceback.format_exception(error)))
            where = f"in {path}"
        except OSError:
            where = "shown with --verbose"
    first = (str(error).strip().splitlines() or [""])[0][:300]
    _complain(f"this is a bug in Decant: {type(error).__name__}: {first}; the traceback is {where}")


def _complain(sentence: str) -> None:
    say(f"decant: error: {sentence}")


def _complain_once(sentence: str, error: BaseException) -> None:
    """Say why this process stops, where a phase of it that was stopped with it has not said so."""
    if not getattr(error, "said", False):
        _complain(sentence)


def _open_streams() -> None:
    """Let standard streams that were closed before the start lead nowhere, so that no file of the work becomes one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            flags, mode = (os.O_RDONLY, "r") if number == 0 else (os.O_WRONLY, "w")
            os.open(os.devnull, flags)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"decant {version('decant-kd')}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    return _guarded(args)


def _guarded(args: argparse.Namespace) -> int:
    """Run the command and turn every way to fail into an exit code and a line."""
    _prepare(args.verbose)
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except DecantError as error:
        if os.environ.get("DECANT_DEBUG") == "1":
            traceback.print_exception(error)
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        _complain_once("interrupted; the same command continues where it stopped", error)
        return EXIT_INTERRUPTED
    except Terminated as error:
        _complain_once(TERMINATED, error)
        return EXIT_TERMINATED
    except OSError as error:
        if error.errno is None:
            _report_bug(error, args)
        else:
            place = f"{error.filename}: " if error.filename else ""
            _complain(on_one_line(f"{place}{refused(error)}"))
        return EXIT_USAGE if error.errno == errno.ENAMETOOLONG else EXIT_FAILED
    except MemoryError as error:
        if args.verbose:
            traceback.print_exception(error)
        _complain(
            f"memory ran out ({reason_of(error)}), of this machine or of a limit such as `ulimit -v`; give it more, or "
            "ask for less at once"
        )
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: a bug is reported in one line, its traceback kept
        _report_bug(error, args)
        return EXIT_FAILED
    except BaseException as error:
        if not is_panic(error):
            raise
        _complain(
            f"a tokenizer's library gave up on a text ({reason_of(error)}); correct the pattern in its tokenizer.json "
            "that never ends on it, or take the text out"
        )
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())

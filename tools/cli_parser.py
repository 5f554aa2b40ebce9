"""The options of every command, and what --help says about them. Imports nothing but the standard library."""

from __future__ import annotations

from argparse import SUPPRESS

from tools.cli_cache_parser import CACHE_COMMANDS
from tools.cli_values import (
    Commands,
    Parser,
    directory,
    file_or_directory,
    partition,
    place,
    positive,
    price,
    repository,
    sample,
    share,
)

PHASES = ("teach", "train", "eval", "report")
SAMPLE_ROWS = 384
"""Rows of `plan --calibrate`: more than an engine answers at once on a CPU, so that its full speed shows."""
_UNSAFE = "run code that models wrote without a sandbox, on a machine that has nothing to lose"
_RUN = "directory of a run (output_dir of its recipe)"
_COMMANDS = Commands()


def build_parser() -> Parser:
    """Return the parser of every command that exists."""
    parser = Parser(
        prog="decant",
        description="Distil a large language model into a small one, offline, through a cache.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.set_defaults(json=False, verbose=False)
    _COMMANDS.add_to(parser, "command")
    return parser


@_COMMANDS.command("init", "write a starter recipe for your models and data, with comments")
def _init(init: Parser) -> None:
    init.add_argument(
        "name", nargs="?", default="distil", metavar="NAME", help="name of the experiment (default: distil)"
    )
    init.add_argument("--teacher", help="teacher: a directory or hub id")
    init.add_argument("--student", help="student: a directory or hub id")
    init.add_argument("--prompts", help="prompts: a file, directory or hub id, see docs/data.md")
    init.add_argument("--cache", type=place, metavar="CACHE", help="train from this cache; no teacher, no prompts")
    init.add_argument("--output", type=file_or_directory, help="where to write it (default: recipes/NAME.yaml)")


@_COMMANDS.command("plan", "count rows, tokens and gigabytes before anything runs")
def _plan(plan: Parser) -> None:
    _recipe(plan)
    card = (
        "say how each stage's training fits a GPU of this memory, such as 24GiB; 2x24GiB: two of them with a process "
        "each, which hold what trainer.fsdp says"
    )
    plan.add_argument("--card", metavar="SIZE", help=card)
    calibrate = (
        f"build a sample (default: {SAMPLE_ROWS} rows) with the real engine and extrapolate hours, gigabytes, memory, "
        "money"
    )
    plan.add_argument("--calibrate", nargs="?", type=sample, const=SAMPLE_ROWS, metavar="ROWS", help=calibrate)
    plan.set_defaults(parser=plan)
    plan.add_argument(
        "--price-per-hour", type=price, metavar="PRICE", help="of one engine, for the money of --calibrate"
    )


@_COMMANDS.command("teach", "phase 1: let the teacher answer and score; continues what is there")
def _teach(teach: Parser) -> None:
    _recipe(teach)
    _max_set_aside(teach)
    shares = "do only share I of N of the plan, I from 0 to N-1"
    teach.add_argument("--partition", type=partition, metavar="I/N", help=shares)
    teach.add_argument(
        "--layer", metavar="NAME", help="run one of several teachers alone: a name of `teachers`, or teacher"
    )


@_COMMANDS.command("train", "phase 2: train the student's stages from the cache; continues what is there")
def _train(train: Parser) -> None:
    _recipe(train)
    train.add_argument("--from-stage", metavar="STAGE", help="begin with this stage")
    train.add_argument("--to-stage", metavar="STAGE", help="end with this stage")


@_COMMANDS.command("rounds", "a stage's rounds: the student answers, the teacher scores, the stage trains")
def _rounds(rounds: Parser) -> None:
    _recipe(rounds)
    rounds.add_argument("--stage", metavar="STAGE", help="the stage, where more than one has rounds")
    rounds.add_argument("--only", choices=("answer", "score", "train"), help="just this step of a round, here")
    rounds.add_argument("--round", type=positive, metavar="N", help="just this round, from 1")


@_COMMANDS.command("eval", "evaluate every model of the recipe side by side")
def _eval(evaluate: Parser) -> None:
    _recipe(evaluate)
    evaluate.add_argument("--allow-unsafe-code", action="store_true", help=_UNSAFE)
    tasks = "also run these tasks of lm-evaluation-harness: names or task files, with commas between them"
    evaluate.add_argument("--lm-eval", metavar="TASKS", help=tasks)


@_COMMANDS.command("run", "teach, train, eval and report, one process per phase")
def _run(run: Parser) -> None:
    _recipe(run)
    run.add_argument("--from", dest="first", choices=PHASES, help="begin with this phase")
    run.add_argument("--to", dest="last", choices=PHASES, help="end with this phase")
    run.add_argument("--only", choices=PHASES, help="just this phase")
    _max_set_aside(run)
    run.add_argument("--allow-unsafe-code", action="store_true", help=_UNSAFE)


@_COMMANDS.command("report", "write report.html, report.md, models.csv and report.json for one run or several")
def _report(report: Parser) -> None:
    report.add_argument("runs", nargs="+", type=directory, metavar="RUN", help=_RUN)
    report.add_argument("--output", type=directory, metavar="DIR", help="where to write it (of one run: into the run)")


@_COMMANDS.command("export", "write a trained student as a plain model directory with a model card")
def _export(export: Parser) -> None:
    export.add_argument("run", type=directory, metavar="RUN", help=_RUN)
    export.add_argument("--stage", metavar="NAME", help="whose model (default: the last stage that is finished)")
    export.add_argument("--output", type=directory, metavar="DIR", help="the new directory (default: RUN/export/NAME)")
    push = "also write it to this model repository of the Hugging Face hub"
    export.add_argument("--push", type=repository, metavar="ORG/NAME", help=push)
    export.add_argument("--keep-adapter", action="store_true", help="put the adapter by itself into adapter/, too")
    dtypes = ["float32", "bfloat16", "float16"]
    export.add_argument(
        "--dtype", choices=dtypes, help="write the weights in this type (default: as they were trained)"
    )


@_COMMANDS.command("schema", "print the JSON schema of recipes, for editors")
def _schema(schema: Parser) -> None:
    schema.add_argument("--page", action="store_true", help="print docs/recipe.md instead: every key with its meaning")


@_COMMANDS.command(
    "cache", f"look into a cache or make another of it: {', '.join(CACHE_COMMANDS.names)}", is_group=True
)
def _cache(cache: Parser) -> None:
    cache.set_defaults(parser=cache)
    CACHE_COMMANDS.add_to(cache, "cache_command")


@_COMMANDS.command("doctor", "say what this machine can do, and the command that mends what it cannot")
def _doctor(doctor: Parser) -> None:
    """Take no options."""


def _max_set_aside(parser: Parser) -> None:
    unusable = "fail when more than this share of rows is unusable (default: 0.01)"
    parser.add_argument("--max-set-aside", type=share, metavar="SHARE", help=unusable)


def _recipe(parser: Parser) -> None:
    parser.add_argument("recipe", type=file_or_directory, metavar="RECIPE", help="a YAML file")
    change = "change a value: stages.kd.trainer.max_steps=10"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE", help=change)
    # For commands that another one starts: it has checked the recipe, for seconds of which all import transformers.
    parser.add_argument("--checked", action="store_true", help=SUPPRESS)

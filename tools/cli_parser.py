"""The options of every command that exists, and what --help says about them. Imports nothing but the
standard library.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PHASES = ("teach", "train", "eval", "report")
EXIT_USAGE = 2
SAMPLE_ROWS = 384
"""Rows of `plan --calibrate`: more than an engine answers at once on a CPU, so that its full speed shows."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and a sentence."""
        self.exit(EXIT_USAGE, f"decant: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> Parser:
    """Return the parser of every command that exists."""
    parser = Parser(
        prog="decant",
        description="Distil a large language model into a small one, offline, through a cache.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.set_defaults(json=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, help_text: str, *, within: Any = commands) -> Parser:
        sub: Parser = within.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", allow_abbrev=False
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.add_argument("--verbose", action="store_true", help="show what libraries log, and tracebacks")
        return sub

    init = command("init", "write a starter recipe for your models and data, with comments")
    init.add_argument(
        "name", nargs="?", default="distil", metavar="NAME", help="name of the experiment (default: distil)"
    )
    init.add_argument("--teacher", help="teacher: a directory or hub id")
    init.add_argument("--student", help="student: a directory or hub id")
    init.add_argument("--prompts", help="prompts: a file, directory or hub id, see docs/data.md")
    init.add_argument("--cache", type=_place, metavar="CACHE", help="train from this cache; no teacher, no prompts")
    init.add_argument("--output", type=Path, help="where to write it (default: recipes/NAME.yaml)")

    plan = _recipe(command("plan", "count rows, tokens and gigabytes before anything runs"))
    plan.add_argument(
        "--card", metavar="SIZE", help="say how each stage's training fits a GPU of this memory, such as 24GiB"
    )
    plan.add_argument(
        "--calibrate",
        nargs="?",
        type=_sample,
        const=SAMPLE_ROWS,
        metavar="ROWS",
        help=(
            f"build a sample (default: {SAMPLE_ROWS} rows) with the real engine and extrapolate hours, gigabytes, "
            "memory, money"
        ),
    )
    plan.set_defaults(parser=plan)
    plan.add_argument(
        "--price-per-hour", type=_price, metavar="PRICE", help="of one engine, for the money of --calibrate"
    )
    teach = _recipe(command("teach", "phase 1: let the teacher answer and score; continues what is there"))
    _max_set_aside(teach)
    teach.add_argument(
        "--partition", type=_partition, metavar="I/N", help="do only share I of N of the plan, I from 0 to N-1"
    )
    teach.add_argument(
        "--layer", metavar="NAME", help="run one of several teachers alone: a name of `teachers`, or teacher"
    )
    train = _recipe(command("train", "phase 2: train the student's stages from the cache; continues what is there"))
    train.add_argument("--from-stage", metavar="STAGE", help="begin with this stage")
    train.add_argument("--to-stage", metavar="STAGE", help="end with this stage")
    rounds = _recipe(command("rounds", "a stage's rounds: the student answers, the teacher scores, the stage trains"))
    rounds.add_argument("--stage", metavar="STAGE", help="the stage, where more than one has rounds")
    rounds.add_argument("--only", choices=("answer", "score", "train"), help="just this step of a round, here")
    rounds.add_argument("--round", type=_positive, metavar="N", help="just this round, from 1")
    unsafe = "run code that models wrote without a sandbox, on a machine that has nothing to lose"
    evaluate = _recipe(command("eval", "evaluate every model of the recipe side by side"))
    evaluate.add_argument("--allow-unsafe-code", action="store_true", help=unsafe)
    tasks = "also run these tasks of lm-evaluation-harness: names or task files, with commas between them"
    evaluate.add_argument("--lm-eval", metavar="TASKS", help=tasks)
    run = _recipe(command("run", "teach, train, eval and report, one process per phase"))
    run.add_argument("--from", dest="first", choices=PHASES, help="begin with this phase")
    run.add_argument("--to", dest="last", choices=PHASES, help="end with this phase")
    run.add_argument("--only", choices=PHASES, help="just this phase")
    _max_set_aside(run)
    run.add_argument("--allow-unsafe-code", action="store_true", help=unsafe)
    report = command("report", "write report.html, report.md, models.csv and report.json for one run or several")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directory of a run (output_dir of its recipe)"
    )
    report.add_argument("--output", type=Path, metavar="DIR", help="where to write it (of one run: into the run)")
    export = command("export", "write a trained student as a plain model directory with a model card")
    export.add_argument("run", type=Path, metavar="RUN", help="directory of a run (output_dir of its recipe)")
    export.add_argument("--stage", metavar="NAME", help="whose model (default: the last stage that is finished)")
    export.add_argument("--output", type=Path, metavar="DIR", help="the new directory (default: RUN/export/NAME)")
    export.add_argument(
        "--push", metavar="ORG/NAME", help="also write it to this model repository of the Hugging Face hub"
    )
    export.add_argument("--keep-adapter", action="store_true", help="put the adapter by itself into adapter/, too")
    dtypes = ["float32", "bfloat16", "float16"]
    export.add_argument(
        "--dtype", choices=dtypes, help="write the weights in this type (default: as they were trained)"
    )

    schema = command("schema", "print the JSON schema of recipes, for editors")
    schema.add_argument("--page", action="store_true", help="print docs/recipe.md instead: every key with its meaning")

    looks = (
        "look into a cache or make another of it: ls, show, stats, verify, gc, drop, push, pull, merge, subset, "
        "export, import, translate, audit"
    )
    cache = commands.add_parser("cache", help=looks, description=looks.capitalize() + ".", allow_abbrev=False)
    _cache_commands(cache, command)
    command("doctor", "say what this machine can do, and the command that mends what it cannot")
    return parser


def _cache_commands(cache: Parser, command: Callable[..., Parser]) -> None:
    """Add `decant cache ...`."""
    cache.set_defaults(parser=cache)
    within = cache.add_subparsers(dest="cache_command", metavar="COMMAND", parser_class=Parser)
    texts = {
        "ls": "list layers, parts, rows and identity",
        "show": "a page that says what a cache is; with --row a row token by token, with the teacher's alternatives",
        "stats": "count rows, positions, bytes per position and more",
        "verify": "check every byte; exit 1 when anything is wrong",
        "gc": "remove what an interrupted build left behind",
        "drop": "take a job, a source or a layer out of a cache; without --yes only list what would go",
    }
    for name, text in texts.items():
        sub = command(name, text, within=within)
        kind = _directory if name in ("gc", "drop") else _place
        sub.add_argument(
            "cache", type=kind, metavar="CACHE", help=f"directory{' or URL' if kind is _place else ''} of the cache"
        )
        if name in ("show", "stats"):
            sub.add_argument("--targets", metavar="NAME", help="targets layer, where there is more than one")
        if name == "show":
            sub.add_argument("--row", type=_row_number, help="which row, from 0 (default: a page of the cache)")
            sub.add_argument("--top", type=_row_number, help="alternatives per token of a row (default: 5)")
        if name == "gc":
            sub.add_argument("--dry-run", action="store_true", help="only list")
        if name == "drop":
            one = sub.add_mutually_exclusive_group(required=True)
            one.add_argument("--job", metavar="ID", help="its rows and their targets (the id, or 8 digits of it)")
            one.add_argument("--source", metavar="NAME", help="the parts that hold rows of this source alone")
            one.add_argument("--layer", metavar="NAME", help="a targets layer or a hidden layer")
            sub.add_argument("--yes", action="store_true", help="remove; no build of the cache may run meanwhile")
    push = command("push", "copy a cache to a URL: what is missing there, with a dataset card", within=within)
    push.add_argument("cache", type=_place, metavar="CACHE", help="directory or URL of the cache")
    push.add_argument("url", type=_url, metavar="URL", help="s3://, gs:// or hf://datasets/ORG/NAME")
    pull = command("pull", "copy a cache from a URL: what is missing here, every part checked", within=within)
    pull.add_argument("url", type=_url, metavar="URL", help="s3://, gs://, hf:// or https:// of the cache")
    pull.add_argument("out", type=_directory, metavar="CACHE", help="the directory, new or of an earlier pull")
    merge = command("merge", "join caches of one identity into a new one, every row once", within=within)
    merge.add_argument("out", type=_directory, metavar="OUT", help="the new cache; must not exist")
    merge.add_argument(
        "caches", type=_place, nargs="+", metavar="CACHE", help="two caches or more; of equal rows the first counts"
    )
    chosen = merge.add_mutually_exclusive_group()
    every = "targets layer to merge, may be repeated (default: those that every cache has)"
    chosen.add_argument("--targets", action="append", metavar="NAME", help=every)
    chosen.add_argument(
        "--no-targets", dest="targets", action="store_const", const=[], help="merge prompts and answers alone"
    )
    merge.add_argument(
        "--copy", action="store_true", help="copy files instead of hard-linking them where that is possible"
    )
    _subset_command(command("subset", "make a cache of some rows of one", within=within))
    export = command("export", "write a cache as plain files for other tools", within=within)
    export.add_argument("cache", type=_place, metavar="CACHE", help="directory or URL of the cache")
    export.add_argument("out", type=_directory, metavar="OUT_DIR", help="the new directory; must not exist")
    formats = ["parquet", "axolotl", "distillkit"]
    export.add_argument("--format", choices=formats, default="parquet", help="kind of file (default: parquet)")
    export.add_argument("--targets", metavar="NAME", help="targets layer, where there is more than one")
    _import_command(command("import", "make a cache of what export wrote, or of what others made", within=within))
    translate = command("translate", "derive a cache in the student's tokenizer; no teacher is loaded", within=within)
    translate.add_argument("cache", type=_place, metavar="CACHE", help="directory or URL of the cache")
    translate.add_argument("out", type=_directory, metavar="OUT", help="the new cache; must not exist")
    translate.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the student's model or tokenizer: a directory or a hub id"
    )
    translate.add_argument("--targets", metavar="NAME", help="targets layer, where there is more than one")
    translate.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template in place of the student's own (default: its own)"
    )
    audit = command(
        "audit",
        "score rows again with the teacher: is it what is stored, and what does the capture lose",
        within=within,
    )
    audit.add_argument("cache", type=_place, metavar="CACHE", help="directory or URL of the cache")
    audit.add_argument(
        "--recipe", type=Path, help="take teacher, adapter and student from a recipe, and keep audit.json in its run"
    )
    audit.add_argument("--targets", metavar="NAME", help="targets layer, where there is more than one")
    audit.add_argument("--teacher", metavar="DIR", help="where the teacher lies (default: where the layer says)")
    audit.add_argument("--adapter", metavar="DIR", help="the adapter that the teacher had")
    audit.add_argument(
        "--student", metavar="DIR", help="completes tails (default: the mean of the teacher's distributions)"
    )
    audit.add_argument("--rows", type=_positive, metavar="N", help="rows to score again, at random (default: 32)")
    audit.add_argument("--seed", type=_row_number, metavar="N", help="seed of the choice of rows (default: 0)")
    audit.add_argument("--k", metavar="K,K", help="heads to compare (default: 8,16,32,64)")
    audit.add_argument("--mass", metavar="M,M", help="masses to compare (default: 0.99,0.999,1)")
    audit.add_argument("--temperatures", metavar="T,T", help="temperatures to compare, besides the layer's")


def _subset_command(subset: Parser) -> None:
    """Add the options of `decant cache subset`."""
    subset.add_argument("cache", type=_place, metavar="CACHE", help="directory or URL of the cache")
    subset.add_argument("out", type=_directory, metavar="OUT_CACHE", help="the new cache; must not exist")
    subset.add_argument("--source", action="append", default=[], metavar="NAME", help="rows of it, may be repeated")
    condition = "rows that fulfil a condition, such as: num_tokens < 512 and 'integral' in prompt"
    subset.add_argument("--query", metavar="CONDITION", help=condition)
    subset.add_argument("--share", type=_share, metavar="SHARE", help="this share of them, at random")
    subset.add_argument("--count", type=_positive, metavar="N", help="at most so many of them, at random")
    subset.add_argument("--seed", type=_row_number, default=0, metavar="N", help="of the chance (default: 0)")
    kept = "targets layer to keep, may be repeated (default: all)"
    subset.add_argument("--targets", action="append", metavar="NAME", help=kept)
    subset.add_argument("--copy", action="store_true", help="copy files instead of hard-linking them")


def _import_command(imports: Parser) -> None:
    """Add the options of `decant cache import`."""
    imports.add_argument(
        "source_path", type=Path, metavar="FILES", help="a directory of files, or one: Parquet, JSON lines or shards"
    )
    imports.add_argument("out", type=_directory, metavar="OUT_CACHE", help="the new cache; must not exist")
    formats = ["decant", "distillkit", "axolotl", "openai", "megatron"]
    imports.add_argument("--format", choices=formats, help="whose files (default: told by endings and columns)")
    imports.add_argument("--tokenizer", metavar="DIR", help="the tokenizer that made the ids")
    imports.add_argument("--teacher", metavar="NAME", help="who made the distributions")
    imports.add_argument("--source", metavar="NAME", help="name of the rows' source (default: imported)")
    imports.add_argument("--licence", metavar="NAME", help="under which the rows may be used")
    tails = "the values are raw log-probabilities, so that 1 minus their sum is the tail (derived), or not (unknown)"
    imports.add_argument("--tail", choices=["derived", "unknown"], help=tails)
    settings = "DistillKit: its compression_config.yaml or recipe (default: the one beside the files)"
    imports.add_argument("--compression", type=Path, metavar="FILE", help=settings)
    ends = "DistillKit: a token that ends the documents of packed rows, may be repeated"
    imports.add_argument("--split-at", action="append", default=[], metavar="TOKEN", help=ends)
    imports.add_argument("--temperature", type=_price, metavar="T", help="Axolotl: kd_temperature of the values")
    shift = "Axolotl: row i is about token i + this (default: measured)"
    imports.add_argument("--shift", type=int, choices=[0, 1], help=shift)
    order = "Megatron-LM: Parquet with input_ids, a sequence a row in the order of training"
    imports.add_argument("--token-ids", type=Path, metavar="FILE", help=order)


def _max_set_aside(parser: Parser) -> None:
    unusable = "fail when more than this share of rows is unusable (default: 0.01)"
    parser.add_argument("--max-set-aside", type=_share, metavar="SHARE", help=unusable)


def _recipe(parser: Parser) -> Parser:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a value: stages.kd.trainer.max_steps=10",
    )
    return parser


def _place(text: str) -> Path:
    from shared.places import place_of

    try:
        return place_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _directory(text: str) -> Path:
    from shared.places import is_url

    if is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is a URL where a directory of this machine is expected")
    return Path(text)


def _url(text: str) -> str:
    from shared.places import is_url, named

    if not is_url(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no URL; expected one such as s3://bucket/demo")
    return named(_place(text))


def _partition(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no share; expected I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.\d+|[01]|1\.0*|0\.", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no share; expected a number from 0 to 1")
    return float(text)


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no count; expected a whole number from 1")
    return int(text)


def _sample(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text) or int(text) < 8:
        raise argparse.ArgumentTypeError(f"'{text}' is no sample; expected a number of rows from 8")
    return int(text)


def _price(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no price; expected a number such as 2.5")
    return float(text)


def _row_number(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no count; expected a whole number from 0")
    return int(text)

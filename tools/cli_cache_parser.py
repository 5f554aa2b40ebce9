"""The options of every `decant cache` command, and what --help says about them. Needs the standard library alone."""

from __future__ import annotations

from tools.cli_values import (
    Commands,
    Parser,
    directory,
    file_or_directory,
    place,
    positive,
    row_number,
    share,
    temperature,
    url,
    url_or_directory,
)

CACHE_COMMANDS = Commands()
_NEW_CACHE = "the new cache; must not exist"
_ONE_LAYER = "targets layer, where there is more than one"


def _from_cache(parser: Parser) -> None:
    parser.add_argument("cache", type=place, metavar="CACHE", help="directory or URL of the cache")


def _in_cache(parser: Parser) -> None:
    parser.add_argument("cache", type=directory, metavar="CACHE", help="directory of the cache")


CACHE_COMMANDS.command("ls", "list layers, parts, rows and identity")(_from_cache)


@CACHE_COMMANDS.command(
    "show", "a page that says what a cache is; with --row a row token by token, with the teacher's alternatives"
)
def _show(show: Parser) -> None:
    _from_cache(show)
    show.add_argument("--targets", metavar="NAME", help=_ONE_LAYER)
    show.add_argument("--row", type=row_number, help="which row, from 0 (default: a page of the cache)")
    show.add_argument("--top", type=row_number, help="alternatives per token of a row (default: 5)")


@CACHE_COMMANDS.command("stats", "count rows, positions, bytes per position and more")
def _stats(stats: Parser) -> None:
    _from_cache(stats)
    stats.add_argument("--targets", metavar="NAME", help=_ONE_LAYER)


CACHE_COMMANDS.command("verify", "check every byte; exit 1 when anything is wrong")(_from_cache)


@CACHE_COMMANDS.command("gc", "remove what an interrupted build left behind")
def _gc(gc: Parser) -> None:
    _in_cache(gc)
    gc.add_argument("--dry-run", action="store_true", help="only list")


@CACHE_COMMANDS.command("drop", "take a job, a source or a layer out of a cache; without --yes only list what would go")
def _drop(drop: Parser) -> None:
    _in_cache(drop)
    one = drop.add_mutually_exclusive_group(required=True)
    one.add_argument("--job", metavar="ID", help="its rows and their targets (the id, or 8 digits of it)")
    one.add_argument("--source", metavar="NAME", help="the parts that hold rows of this source alone")
    one.add_argument("--layer", metavar="NAME", help="a targets layer or a hidden layer")
    drop.add_argument("--yes", action="store_true", help="remove; no build of the cache may run meanwhile")


@CACHE_COMMANDS.command(
    "push", "copy a cache to a URL or a web server's directory: what is missing there, with a dataset card"
)
def _push(push: Parser) -> None:
    _from_cache(push)
    place = "s3://, gs:// or hf://datasets/ORG/NAME, or a directory that a web server serves"
    push.add_argument("url", type=url_or_directory, metavar="URL", help=place)


@CACHE_COMMANDS.command("pull", "copy a cache from a URL: what is missing here, every part checked")
def _pull(pull: Parser) -> None:
    pull.add_argument("url", type=url, metavar="URL", help="s3://, gs://, hf:// or https:// of the cache")
    pull.add_argument("out", type=directory, metavar="CACHE", help="the directory, new or of an earlier pull")


@CACHE_COMMANDS.command("merge", "join caches of one identity into a new one, every row once")
def _merge(merge: Parser) -> None:
    merge.add_argument("out", type=directory, metavar="OUT", help=_NEW_CACHE)
    several = "two caches or more; of equal rows the first counts"
    merge.add_argument("caches", type=place, nargs="+", metavar="CACHE", help=several)
    chosen = merge.add_mutually_exclusive_group()
    every = "targets layer to merge, may be repeated (default: those that every cache has)"
    chosen.add_argument("--targets", action="append", metavar="NAME", help=every)
    alone = "merge prompts and answers alone"
    chosen.add_argument("--no-targets", dest="targets", action="store_const", const=[], help=alone)
    copies = "copy files instead of hard-linking them where that is possible"
    merge.add_argument("--copy", action="store_true", help=copies)


@CACHE_COMMANDS.command("subset", "make a cache of some rows of one")
def _subset(subset: Parser) -> None:
    _from_cache(subset)
    subset.add_argument("out", type=directory, metavar="OUT_CACHE", help=_NEW_CACHE)
    subset.add_argument("--source", action="append", default=[], metavar="NAME", help="rows of it, may be repeated")
    condition = "rows that fulfil a condition, such as: num_tokens < 512 and 'integral' in prompt"
    subset.add_argument("--query", metavar="CONDITION", help=condition)
    subset.add_argument("--share", type=share, metavar="SHARE", help="this share of them, at random")
    subset.add_argument("--count", type=positive, metavar="N", help="at most so many of them, at random")
    subset.add_argument("--seed", type=row_number, default=0, metavar="N", help="of the chance (default: 0)")
    kept = "targets layer to keep, may be repeated (default: all)"
    subset.add_argument("--targets", action="append", metavar="NAME", help=kept)
    subset.add_argument("--copy", action="store_true", help="copy files instead of hard-linking them")


@CACHE_COMMANDS.command("export", "write a cache as plain files for other tools")
def _export(export: Parser) -> None:
    _from_cache(export)
    export.add_argument("out", type=directory, metavar="OUT_DIR", help="the new directory; must not exist")
    formats = ["parquet", "axolotl", "distillkit"]
    export.add_argument("--format", choices=formats, default="parquet", help="kind of file (default: parquet)")
    export.add_argument("--targets", metavar="NAME", help=_ONE_LAYER)


@CACHE_COMMANDS.command("import", "make a cache of what export wrote, or of what others made")
def _import(imports: Parser) -> None:
    files = "a directory of files, or one: Parquet, JSON lines or shards"
    imports.add_argument("source_path", type=file_or_directory, metavar="FILES", help=files)
    imports.add_argument("out", type=directory, metavar="OUT_CACHE", help=_NEW_CACHE)
    formats = ["decant", "distillkit", "axolotl", "openai", "megatron"]
    imports.add_argument("--format", choices=formats, help="whose files (default: told by endings and columns)")
    imports.add_argument("--tokenizer", metavar="DIR", help="the tokenizer that made the ids")
    imports.add_argument("--teacher", metavar="NAME", help="who made the distributions")
    imports.add_argument("--source", metavar="NAME", help="name of the rows' source (default: imported)")
    imports.add_argument("--licence", metavar="NAME", help="under which the rows may be used")
    tails = "the values are raw log-probabilities, so that 1 minus their sum is the tail (derived), or not (unknown)"
    imports.add_argument("--tail", choices=["derived", "unknown"], help=tails)
    settings = "DistillKit: its compression_config.yaml or recipe (default: the one beside the files)"
    imports.add_argument("--compression", type=file_or_directory, metavar="FILE", help=settings)
    ends = "DistillKit: a token that ends the documents of packed rows, may be repeated"
    imports.add_argument("--split-at", action="append", default=[], metavar="TOKEN", help=ends)
    imports.add_argument("--temperature", type=temperature, metavar="T", help="Axolotl: kd_temperature of the values")
    shift = "Axolotl: row i is about token i + this (default: measured)"
    imports.add_argument("--shift", type=int, choices=[0, 1], help=shift)
    unusable = "OpenAI: refuse more unusable answers than this share (default: 0.01)"
    imports.add_argument("--max-set-aside", type=share, metavar="SHARE", help=unusable)
    order = "Megatron-LM: Parquet with input_ids, a sequence a row in the order of training"
    imports.add_argument("--token-ids", type=file_or_directory, metavar="FILE", help=order)


@CACHE_COMMANDS.command("translate", "derive a cache in the student's tokenizer; no teacher is loaded")
def _translate(translate: Parser) -> None:
    _from_cache(translate)
    translate.add_argument("out", type=directory, metavar="OUT", help=_NEW_CACHE)
    whose = "the student's model or tokenizer: a directory or a hub id"
    translate.add_argument("--tokenizer", required=True, metavar="DIR", help=whose)
    translate.add_argument("--targets", metavar="NAME", help=_ONE_LAYER)
    template = "Jinja template in place of the student's own (default: its own)"
    translate.add_argument("--chat-template", metavar="FILE", help=template)


@CACHE_COMMANDS.command(
    "audit", "score rows again with the teacher: is it what is stored, and what does the capture lose"
)
def _audit(audit: Parser) -> None:
    _from_cache(audit)
    recipe = "take teacher, adapter and student from a recipe, and keep audit.json in its run"
    audit.add_argument("--recipe", type=file_or_directory, help=recipe)
    audit.add_argument("--targets", metavar="NAME", help=_ONE_LAYER)
    audit.add_argument("--teacher", metavar="DIR", help="where the teacher lies (default: where the layer says)")
    audit.add_argument("--adapter", metavar="DIR", help="the adapter that the teacher had")
    student = "completes tails (default: the mean of the teacher's distributions)"
    audit.add_argument("--student", metavar="DIR", help=student)
    audit.add_argument("--rows", type=positive, metavar="N", help="rows to score again, at random (default: 32)")
    audit.add_argument("--seed", type=row_number, metavar="N", help="seed of the choice of rows (default: 0)")
    audit.add_argument("--k", metavar="K,K", help="heads to compare (default: 8,16,32,64)")
    audit.add_argument("--mass", metavar="M,M", help="masses to compare (default: 0.99,0.999,1)")
    audit.add_argument("--temperatures", metavar="T,T", help="temperatures to compare, besides the layer's")

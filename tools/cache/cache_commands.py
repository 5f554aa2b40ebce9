"""`decant cache ...`: what is in a cache, whether it is whole, what can go, and how caches become something else.

Nothing here loads a model or a framework; `ls` and `stats` read commit records alone, `verify` reads every byte once.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.cache.layout import HiddenLayer, Layer, list_hidden_layers, list_layers, read_header, sequences_dir
from shared.cache.reading.verify import parts_without_layer, verify_cache
from shared.cache.sync.mirror import bring_if_remote
from shared.cache.writing.drop import carry_out, drop_job, drop_layer, drop_source
from shared.cache.writing.garbage import collect_garbage
from shared.errors import PromptError, UsageError
from shared.identity.hidden_layers import layer_name
from shared.parts.jobs import list_jobs
from shared.parts.part_stats import ENTROPY_BIN_NATS
from shared.parts.records import list_records
from shared.places import is_url, named, with_urls
from shared.progress import Progress
from shared.schema import STEM_PATTERN
from shared.text.printable import printable
from tools.cache.cache_show import page_document, page_lines, row_document, row_text

Answer = tuple[Any, str] | tuple[Any, str, int]
"""What a command says: the document of --json, what people see, and the exit code where it may be another than 0."""


def run_cache_command(args: argparse.Namespace) -> Answer:
    """Run one of the commands: `ls` is `_ls` of this module.

    Raises:
        CacheError: the path is no cache, or what was asked for is not in it.
    """
    command: Callable[[argparse.Namespace], Answer] = globals()[f"_{args.cache_command}"]
    for path in (getattr(args, "cache", None), *getattr(args, "caches", ())):
        if path is not None:
            bring_if_remote(path)
    return command(args)


def listing(path: Path) -> dict[str, Any]:
    """Return identity, rows, layers and jobs of a cache, from its small files alone.

    Raises:
        CacheError: the path is no cache, or one of its small files is damaged.
    """
    header = read_header(path)
    records = list_records(sequences_dir(path))
    stems = {record.stem for record in records}
    layers = {name: _layer_listing(layer, stems) for name, layer in list_layers(path).items()}
    hidden = {name: _layer_listing(layer, stems) for name, layer in list_hidden_layers(path).items()}
    jobs = {}
    for job in list_jobs(path):
        done = sum(job.part_stem(unit) in stems for unit in range(job.num_units))
        planned = datetime.fromtimestamp(job.path.stat().st_mtime, UTC).isoformat(timespec="minutes")
        drawn = job.request.get("generate")
        jobs[job.id] = {
            "units": job.num_units,
            "committed": done,
            "rows": sum(record.rows for record in records if record.id8 == job.id8),
            "planned": planned,
            "generate": drawn if isinstance(drawn, dict) else None,
        }
    sources: Counter[str] = Counter()
    for record in records:
        sources.update({name: figures["rows"] for name, figures in record.stats.get("sources", {}).items()})
    return {
        "path": str(path),
        "identity": header.identity.to_json(),
        "parts": len(records),
        "rows": sum(record.rows for record in records),
        "positions": sum(record.positions for record in records),
        "bytes": sum(record.bytes for record in records),
        "set_aside": sum(len(record.set_aside) for record in records),
        "sources": dict(sorted(sources.items())),
        "layers": layers,
        "hidden": hidden,
        "layers_bytes": sum(layer["bytes"] for layer in (*layers.values(), *hidden.values())),
        "jobs": jobs,
    }


def _layer_listing(layer: Layer | HiddenLayer, stems: set[str]) -> dict[str, Any]:
    """Return identity and sizes of a layer, over the sequences parts that exist."""
    covered = [record for record in list_records(layer.directory) if record.stem in stems]
    return {
        "identity": layer.identity.to_json(),
        "parts": len(covered),
        "rows": sum(record.rows for record in covered),
        "positions": sum(record.positions for record in covered),
        "bytes": sum(record.bytes for record in covered),
    }


def _ls(args: argparse.Namespace) -> Answer:
    found = listing(args.cache)
    return found, "\n".join(_listing_lines(found))


def _listing_lines(found: Mapping[str, Any]) -> list[str]:
    identity = found["identity"]
    lines = [
        f"{found['path']}: {found['rows']:,} rows, {found['positions']:,} positions in {found['parts']:,} parts, "
        f"{size(found['bytes'])}",
        f"  tokenizer {identity['tokenizer'] or '-'} ({identity['vocab_size']:,} entries, "
        f"{identity['tokenizer_hash'][:8]})",
    ]
    lines += [f"  {name} {identity[name]}" for name in ("answers", "licence") if identity[name]]
    lines += [f"  source {name}: {rows:,} rows" for name, rows in found["sources"].items()]
    lines += [f"  {found['set_aside']:,} rows were set aside"] if found["set_aside"] else []
    for kind, layers, described in (("targets", "layers", _layer_text), ("hidden", "hidden", _hidden_text)):
        for name, layer in found[layers].items():
            covered = f"{layer['parts']:,} of {found['parts']:,} parts, {layer['rows']:,} rows, {size(layer['bytes'])}"
            lines += [f"  {kind} {name}: {covered}", f"    {described(layer['identity'])}"]
    lines += [] if found["layers"] else ["  no targets layer yet"]
    lines.append(f"  all layers: {size(found['layers_bytes'])}")
    return [*lines, *(_job_text(job, counts) for job, counts in found["jobs"].items())]


def _job_text(job: str, counts: Mapping[str, Any]) -> str:
    drawn = counts["generate"] or {}
    settings = ", ".join(f"{name} {drawn[name]}" for name in sorted(drawn) if drawn[name] not in (None, [], {}, ""))
    return (
        f"  job {job[:8]}: {counts['committed']:,} of {counts['units']:,} units committed, {counts['rows']:,} rows, "
        f"planned {counts['planned'].replace('+00:00', ' UTC')}{'; answers drawn with ' if settings else ''}{settings}"
    )


def _layer_text(identity: Mapping[str, Any]) -> str:
    temperatures = ", ".join(f"{value:g}" for value in identity["temperatures"])
    parts = [
        f"teacher {identity['teacher']}",
        f"dtype {identity['dtype']}",
        f"mode {identity['mode']}",
        f"k {identity['k']}",
    ]
    parts += [f"draws {identity['draws']}"] if identity["draws"] else []
    parts += [f"mass {identity['mass']:g}", f"temperatures {temperatures}", f"weights {identity['weights_hash'][:8]}"]
    parts += [f"{name} {identity[name]}" for name in ("revision", "quantization", "adapter") if identity[name]]
    parts += [f"tail {identity['tail']}"] if "tail" in identity else []
    parts += ["labels in the head"] if identity.get("label") == "head" else []
    parts += ["labels known in the head"] if "labels" in identity else []
    parts += [f"derived from {identity['derived_from']} ({identity['method']})"] if identity.get("derived_from") else []
    return ", ".join(parts)


def _hidden_text(identity: Mapping[str, Any]) -> str:
    width = (
        identity["width"]
        if identity["projection"] is None
        else f"{identity['width']} projected to {identity['projection']}"
    )
    parts = [f"teacher {identity['teacher']}", f"dtype {identity['dtype']}", f"width {width}"]
    parts += [f"layers {', '.join(map(layer_name, identity['layers']))}"] if identity["layers"] else []
    parts += [f"pooled {identity['pooled']}"] if identity["pooled"] != "none" else []
    if identity["attention_layers"]:
        parts.append(
            f"attention of layers {', '.join(map(str, identity['attention_layers']))}, strongest "
            f"{identity['strongest']} keys"
        )
    return ", ".join([*parts, f"weights {identity['weights_hash'][:8]}"])


def _show(args: argparse.Namespace) -> Answer:
    if (args.row, args.top, args.targets) == (None, None, None):
        document = page_document(listing(args.cache), args.cache)
        return document, "\n".join([*_listing_lines(document), *page_lines(document)])
    cache = Cache.open(args.cache, args.targets, allow_partial=True)
    document = row_document(cache, args.row or 0, 5 if args.top is None else args.top)
    return document, row_text(document)


def _stats(args: argparse.Namespace) -> Answer:
    cache = Cache.open(args.cache, args.targets, allow_partial=True)
    hidden = {
        name: {
            "positions": layer["positions"],
            "bytes": layer["bytes"],
            "bytes_per_position": layer["bytes"] / max(layer["positions"], 1),
        }
        for name, layer in listing(args.cache)["hidden"].items()
    }
    stats = {"layer": cache.layer_name, **cache.stats(), "hidden": hidden}
    lines = [f"{args.cache}, layer {cache.layer_name}" if cache.layer_name else f"{args.cache}, no targets layer"]
    mode, tail = (cache.layer.mode, cache.layer.tail) if cache.layer else ("top", "exact")
    unsaid = {"entropy_bin_nats", "mean_entropy_nats", *(["mean_tail_mass"] if tail == "unknown" else [])}
    words = {} if tail == "exact" else {"impossible_labels": "labels not known"}
    for name, value in stats.items():
        if isinstance(value, int | float) and name not in unsaid:
            said = words.get(name, name.replace("_", " "))
            lines.append(f"  {said}: {value:,}" if isinstance(value, int) else f"  {said}: {value:,.4g}")
    for source, figures in stats["sources"].items():
        lines.append(
            f"  source {source}: {figures['rows']:,} rows, {figures['tokens']:,} tokens, {figures['positions']:,} "
            "positions"
        )
    for name, figures in stats["hidden"].items():
        lines.append(
            f"  hidden {name}: {figures['positions']:,} positions, {figures['bytes_per_position']:,.1f} bytes per "
            "position"
        )
    lines += [f"  finish reason {reason}: {count:,} rows" for reason, count in stats["finish_reasons"].items()]
    lines += [f"  set aside: {count:,} rows, {reason}" for reason, count in stats["set_aside"].items()]
    if "entropy_histogram" in stats:
        if mode == "sample":
            lines.append("  entropy of the teacher: not known from draws alone")
        elif tail == "unknown":
            lines.append("  entropy of the teacher: not known without the mass outside its heads")
        else:
            lines += [
                f"  entropy of head and bucket, {stats['mean_entropy_nats']:.4g} nats on average (the teacher's is at "
                "least that):",
                *_bars(stats["entropy_histogram"], lambda i: f"{i * ENTROPY_BIN_NATS:5.2f}"),
            ]
        lines += [
            "  entries kept, at least:",
            *_bars(stats["support_histogram"], lambda i: f"{0 if i == 0 else 2 ** (i - 1):5d}"),
        ]
    return stats, "\n".join(lines)


def _bars(counts: list[int], label: Callable[[int], str]) -> list[str]:
    """Draw a histogram up to its last count that is not 0."""
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    total, most = max(sum(counts), 1), max(*counts, 1)
    return [
        f"    {label(i)} {'#' * round(40 * count / most):40} {100 * count / total:5.1f} %".rstrip()
        for i, count in enumerate(counts[: last + 1])
    ]


def _verify(args: argparse.Namespace) -> Answer:
    problems = []
    if not (args.cache / "cache.json").exists():
        read_header(args.cache)
    for problem in map(with_urls, verify_cache(args.cache)):
        problems.append(problem)
        if not args.json:
            print(printable(problem), flush=True)
    if problems:
        many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        of_parts = any(STEM_PATTERN.search(problem) for problem in problems)
        rebuilt = "; damaged parts are rebuilt by `decant teach` once they and their records are deleted"
        said = many + (rebuilt if of_parts else "")
        return {"problems": problems, "parts_without_layer": {}}, said, 1
    found, silent = listing(args.cache), parts_without_layer(args.cache)
    layers = len(found["layers"]) + len(found["hidden"])
    lines = [f"{named(args.cache)}: {found['rows']:,} rows and {layers} layers are as they were committed"]
    lines += [
        f"{count:,} parts of {name} do not say which layer they are of: an earlier version of Decant wrote them"
        for name, count in silent.items()
    ]
    return {"problems": [], "parts_without_layer": silent}, "\n".join(lines)


def _gc(args: argparse.Namespace) -> Answer:
    sizes = {path: path.lstat().st_size for path in collect_garbage(args.cache, dry_run=True)}
    removed = [] if args.dry_run else collect_garbage(args.cache, dry_run=False)
    chosen = list(sizes) if args.dry_run else removed
    total = sum(sizes.get(path, 0) for path in chosen)
    verb = "would be removed" if args.dry_run else "removed"
    lines = [*map(str, chosen), f"{len(chosen)} files, {size(total)} {verb}"]
    return {"files": [str(path) for path in chosen], "bytes": total, "dry_run": args.dry_run}, "\n".join(lines)


def _drop(args: argparse.Namespace) -> Answer:
    if args.job is not None:
        drop, what = drop_job(args.cache, args.job), f"job {args.job}"
    elif args.source is not None:
        drop, what = drop_source(args.cache, args.source), f"source {args.source}"
    else:
        drop, what = drop_layer(args.cache, args.layer), f"layer {args.layer}"
    files = drop.files()
    total = sum(file.lstat().st_size for file in files)
    count = carry_out(drop) if args.yes else len(files)
    verb = "removed" if args.yes else "would be removed; give --yes to remove them"
    lines = [] if args.yes else [str(file) for file in files]
    lines.append(f"{args.cache}: {what}: {count:,} files of {len(drop.stems):,} parts of rows, {size(total)} {verb}")
    lines += [f"the plan of job {job} still lists these rows: its recipe would build them again" for job in drop.jobs]
    found = {"files": list(map(str, files)), "bytes": total, "parts": sorted(drop.stems), "removed": args.yes}
    return {**found, "jobs_that_list_them": list(drop.jobs)}, "\n".join(lines)


def _rows(*caches: Path) -> int:
    """Return how many rows caches hold, for a progress bar."""
    return sum(record.rows for path in caches for record in list_records(sequences_dir(path)))


def _merge(args: argparse.Namespace) -> Answer:
    from tools.cache.cache_merge import merge_caches, merge_text

    with Progress("merge", _rows(*args.caches)) as progress:
        result = merge_caches(args.out, args.caches, args.targets, args.copy, progress.advance)
    return result, merge_text(result)


def _subset(args: argparse.Namespace) -> Answer:
    from tools.cache.cache_subset import Choice, subset_cache, subset_text

    choice = Choice(tuple(args.source), args.query, args.share, args.count, args.seed)
    with Progress("subset", _rows(args.cache)) as progress:
        result = subset_cache(args.cache, args.out, choice, args.targets, args.copy, progress.advance)
    return result, subset_text(result)


def _export(args: argparse.Namespace) -> Answer:
    from tools.cache.foreign.export_foreign import export_foreign
    from tools.cache.parquet_export import export_cache, export_text

    with Progress("export", _rows(args.cache)) as progress:
        if args.format == "parquet":
            result = export_cache(args.cache, args.out, args.targets, progress.advance)
        else:
            result = export_foreign(args.cache, args.out, args.format, args.targets, progress.advance)
    return result, f"{export_text(result)}, {size(result['bytes'])}"


def _import(args: argparse.Namespace) -> Answer:
    from tools.cache.foreign.formats import import_any

    with Progress("import", None) as progress:
        return import_any(args, progress.advance)


def _translate(args: argparse.Namespace) -> Answer:
    from shared.cache.rendering import template_text
    from tools.cache.translate.translate_cache import translate_cache, translate_text

    try:
        template = template_text(args.chat_template)
    except PromptError as error:
        raise UsageError(f"--chat-template {error}") from None
    with Progress("translate", 2 * _rows(args.cache)) as progress:
        result = translate_cache(
            args.cache,
            args.out,
            args.tokenizer,
            targets=args.targets,
            chat_template=template,
            advance=progress.advance,
        )
    return result, translate_text(result)


def _push(args: argparse.Namespace) -> Answer:
    from shared.cache.sync.push import push_cache
    from shared.remote.transfer import Remote
    from tools.cache.dataset_card import dataset_card

    url = args.url if is_url(args.url) else "https://HOST/PATH"
    card = dataset_card(listing(args.cache), url).encode()
    with Progress("push", None, unit="files") as progress:
        done = push_cache(args.cache, Remote(args.url), card, progress.advance)
    text = (
        f"{args.url}: {done.files:,} files, {size(done.bytes)} written, {done.already_there:,} were there; train from "
        f"it with `cache: {url}`{'' if url == args.url else ' once a web server serves it'}"
    )
    if done.unfinished:
        text += (
            f"\n{done.unfinished:,} files of pushes that were killed, or go on, are there half; {_way_out(args.url)}"
        )
    return {"url": args.url, **done._asdict()}, text


def _way_out(url: str) -> str:
    """Say how what killed pushes left at a place is removed."""
    if is_url(url):
        return "abort those multipart uploads, or let a lifecycle rule of the bucket do so (they cost as much as files)"
    return f"`decant cache gc {shlex.quote(url)}` removes those that nobody wrote to for an hour"


def _pull(args: argparse.Namespace) -> Answer:
    from shared.cache.sync.pull import pull_cache
    from shared.remote.transfer import Remote

    with Progress("pull", None, unit="files") as progress:
        files = pull_cache(Remote(args.url), args.out, progress.advance)
    return {"cache": str(args.out), "files": files}, f"{args.out}: {files:,} files came from {args.url}"


def _audit(args: argparse.Namespace) -> Answer:
    from tools.audit.audit_cache import run_audit

    found, text = run_audit(args)
    return found, text, 1 if found["faithfulness"]["unfaithful"] else 0


def size(num_bytes: float) -> str:
    """Write a size for people, in powers of ten.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"

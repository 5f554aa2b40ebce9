"""`decant cache merge`: several caches of one identity become one.

Algorithm: parts are taken over as they are, by hard link or copy after their checksum was compared; of rows with equal
row_keys the first counts (caches in the order given, parts by name, as readers choose too), and a part that repeats
rows is written again without them, its blobs byte for byte. All parts get names of one job, whose plan is empty because
nothing of it is left to do: readers need not look for repeats in the result, and later builds list that job as
complete.

Everything is written into `.OUT.merging-JOB8` beside OUT, cache.json after the parts, and renamed to OUT in one step.
JOB hashes the contents of the inputs, so a killed merge is continued by the same command, and by no other. Cost: each
byte is read once, or copied; memory: the commit records, one part that is written again, and what shared keys take
(shared/parts/repeated_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.atomic import make_dir
from shared.cache.layout import (
    CacheHeader,
    Layer,
    choose_layer,
    list_hidden_layers,
    list_layers,
    read_header,
    sequences_dir,
)
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import write_layer
from shared.cache.writing.part_takeover import TakeOver, rewrite_part
from shared.errors import CacheError, IdentityError, UsageError
from shared.identity.identity import difference
from shared.parts.cache_files import read_bounded
from shared.parts.records import PartRecord, check_counts, list_records
from shared.parts.repeated_rows import repeated_rows
from shared.places import resolved
from shared.schema import MAX_JSON_BYTES
from tools.cache.staged_directory import DerivedCache, unfinished


@dataclass(slots=True)
class Source:
    """One of the caches that are merged."""

    path: Path
    header: CacheHeader
    layers: dict[str, Layer]
    """By hash of identity."""
    records: list[PartRecord]
    dropped: int = 0


@dataclass(slots=True)
class Merge:
    """What one merge does, and how far it came."""

    out: DerivedCache
    sources: list[Source]
    layers: dict[str, str]
    """Hash of each layer's identity -> name of its directory."""
    take_over: TakeOver
    unscored: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    rows: int = 0


def merge_caches(
    out: Path,
    inputs: Sequence[Path],
    targets: Sequence[str] | None = None,
    copy: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Merge caches into a new one.

    Args:
        out: the new cache; must not exist, or be the result of the same merge.
        inputs: at least two caches; of equal rows that of the first counts.
        targets: layers to merge, by NAME or NAME-HASH8; none for an empty list, and all that every input has for None.
        copy: copy parts instead of linking them, so that the new cache shares no file with its inputs.
        advance: called with the rows that are done.

    Returns:
        cache, job, existed, rows, parts, linked, copied, rewritten, inputs (path, rows, dropped), layers, unscored,
        left_out, hidden_left_out (hidden layers of the inputs) and unfinished (what killed merges of other caches left
        beside `out`).

    Raises:
        UsageError: fewer than two inputs, or one that is listed twice.
        IdentityError: the inputs differ in identity.
        CacheError: an input is damaged, or `out` is something else.
    """
    places = {resolved(path) for path in inputs}
    if len(places) < max(2, len(inputs)):
        raise UsageError(
            f"a merge needs two different caches or more, each named once, got {', '.join(map(str, inputs))}"
        )
    sources = [open_source(path) for path in inputs]
    _check_sequences(sources)
    layers, left_out = common_layers(sources, targets)
    request = {"merge": [fingerprint(source, layers) for source in sources], "layers": sorted(layers)}
    derived = DerivedCache.of(out, "merging", "the merge of these caches as they are now", request)
    merge = Merge(derived, sources, layers, TakeOver(copy))
    repeats = repeated_rows([(sequences_dir(source.path), record) for source in sources for record in source.records])
    return {
        **carry_out(merge, repeats, advance),
        "inputs": [
            {"path": str(s.path), "rows": sum(record.rows for record in s.records), "dropped": s.dropped}
            for s in sources
        ],
        "unscored": {name: count for name, count in merge.unscored.items() if count},
        "left_out": left_out,
        "unfinished": unfinished(out, "merging"),
    }


def open_source(path: Path) -> Source:
    """Read the small files of a cache."""
    layers = {layer.identity.hash8: layer for layer in list_layers(path).values()}
    return Source(path, read_header(path), layers, list_records(sequences_dir(path)))


def _check_sequences(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        problem = difference(first.header.identity, other.header.identity, first.path, other.path)
        if problem:
            raise IdentityError(
                f"{other.path} cannot be merged with {first.path}: {problem}; only caches with the same tokenizer and "
                "template are one"
            )


def common_layers(
    sources: Sequence[Source], targets: Sequence[str] | None
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the layers to merge, hash8 -> name, and those that are left out with the inputs that lack them.

    Raises:
        IdentityError: two inputs hold different captures under one name, and neither is to be left out.
        CacheError: a layer that was asked for is in no input, or not in all.
    """
    found = {hash8: layer for source in reversed(sources) for hash8, layer in source.layers.items()}
    lacking = {hash8: [str(source.path) for source in sources if hash8 not in source.layers] for hash8 in found}
    by_name = {layer.full_name: layer for layer in found.values()}
    if targets is not None:
        wanted = [choose_layer(by_name, name, sources[0].path) for name in targets]
        chosen = {layer.identity.hash8 for layer in wanted if layer is not None}
        for hash8 in chosen:
            if lacking[hash8]:
                raise CacheError(
                    f"layer {found[hash8].full_name} is not in {', '.join(lacking[hash8])}, so it cannot be merged; "
                    "score it there with 'decant teach' or leave it out"
                )
    else:
        chosen = {hash8 for hash8 in found if not lacking[hash8]}
        _check_names(sources, chosen)
    left_out = [
        {"layer": layer.full_name, "not_in": lacking[hash8]} for hash8, layer in found.items() if hash8 not in chosen
    ]
    return {hash8: found[hash8].full_name for hash8 in sorted(chosen)}, sorted(
        left_out, key=lambda entry: str(entry["layer"])
    )


def _check_names(sources: Sequence[Source], chosen: set[str]) -> None:
    """Refuse two captures under one name of which each is missing somewhere: one was meant to be the other."""
    for i, source in enumerate(sources):
        for layer in source.layers.values():
            for other in sources[i + 1 :]:
                for rival in other.layers.values():
                    known = layer.identity.hash8 in other.layers or rival.identity.hash8 in source.layers
                    if known or layer.short_name != rival.short_name:
                        continue
                    problem = difference(layer.identity, rival.identity, source.path, other.path) or "they differ"
                    raise IdentityError(
                        f"layer {layer.short_name} of {other.path} cannot be merged with that of {source.path}: "
                        f"{problem}; score one of them again, or name the layers to merge "
                        "with --targets (or --no-targets)"
                    )


def fingerprint(source: Source, layers: dict[str, str]) -> str:
    """Return 32 hexadecimal digits for what is taken from a cache; where it lies does not count."""
    digest = xxhash.xxh3_128(read_bounded(source.path / "cache.json", MAX_JSON_BYTES))
    for record in source.records:
        digest.update(f"{record.stem} {record.xxh3}\n".encode())
    for hash8 in layers:
        digest.update(f"{hash8}\n".encode())
        for record in list_records(source.layers[hash8].directory):
            digest.update(f"{record.stem} {record.xxh3}\n".encode())
    return digest.hexdigest()


def carry_out(
    merge: Merge, dropped_rows: Mapping[int, NDArray[np.bool_]], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write the new cache, or only count where it existed; `dropped_rows` of part i are left out.

    Returns:
        cache, job, existed, rows, parts, linked, copied, rewritten, layers and hidden_left_out.
    """
    out, take_over = merge.out, merge.take_over
    if out.existed:
        _write_parts(merge, dropped_rows, advance)
    else:
        tokenizer = read_tokenizer_files(merge.sources[0].path)  # a damaged one is refused before any work
        with out.written():
            make_dir(sequences_dir(out.path))
            _write_layers(merge)
            _write_parts(merge, dropped_rows, advance)
            _write_header(merge, tokenizer)
    return {
        "cache": str(out.out),
        "job": out.job,
        "existed": out.existed,
        "rows": merge.rows,
        "parts": merge.parts,
        "linked": take_over.linked,
        "copied": take_over.copied,
        "rewritten": take_over.rewritten,
        "layers": sorted(merge.layers.values()),
        "hidden_left_out": sorted({name for source in merge.sources for name in list_hidden_layers(source.path)}),
    }


def _write_layers(merge: Merge) -> None:
    """Write layer.json of every layer that is taken over."""
    for hash8, name in merge.layers.items():
        found = [source.layers[hash8] for source in merge.sources]
        provenances = [dict(layer.provenance) for layer in found]
        same = all(provenance == provenances[0] for provenance in provenances)
        provenance = provenances[0] if same else {"merged": provenances}
        write_layer(Layer(merge.out.path / "targets" / name, provenance, found[0].identity))


def _write_parts(merge: Merge, dropped_rows: Mapping[int, NDArray[np.bool_]], advance: Callable[[int], None]) -> None:
    """Take over every part, or only count."""
    index = -1
    for source in merge.sources:
        scored = {
            hash8: {record.stem: record for record in list_records(source.layers[hash8].directory)}
            for hash8 in merge.layers
        }
        for record in source.records:
            index += 1
            mask = dropped_rows.get(index)
            dropped = 0 if mask is None else int(mask.sum())
            source.dropped += dropped
            if dropped and dropped == record.rows:
                advance(record.rows)
                continue
            if not merge.out.existed:
                _write_part(merge, source, record, merge.out.stem(merge.parts), None if mask is None else ~mask, scored)
            for hash8, name in merge.layers.items():
                merge.unscored[name] = merge.unscored.get(name, 0) + (record.stem not in scored[hash8])
            merge.parts += 1
            merge.rows += record.rows - dropped
            advance(record.rows)


def _write_part(
    merge: Merge,
    source: Source,
    record: PartRecord,
    stem: str,
    kept: NDArray[np.bool_] | None,
    scored: dict[str, dict[str, PartRecord]],
) -> None:
    """Take over one part of sequences and its targets."""
    layers = [
        (source.layers[hash8], scored[hash8][record.stem], merge.out.path / "targets" / name)
        for hash8, name in merge.layers.items()
        if record.stem in scored[hash8]
    ]
    for layer, targets, _ in layers:
        check_counts(layer.directory, targets, record)
    if kept is not None:
        rewrite_part(sequences_dir(source.path), record, kept, sequences_dir(merge.out.path), stem, layers)
        merge.take_over.rewritten += 1
        return
    merge.take_over.part(sequences_dir(source.path), record, sequences_dir(merge.out.path), stem)
    for layer, targets, directory in layers:
        merge.take_over.part(layer.directory, targets, directory, stem)


def _write_header(merge: Merge, tokenizer: Mapping[str, bytes]) -> None:
    """Write cache.json and tokenizer: from now on the directory is a cache."""
    first = merge.sources[0]
    headers = [source.header.identity for source in merge.sources]
    identity = replace(
        first.header.identity,
        licence=_joined([header.licence for header in headers], " AND "),
        answers=_joined([header.answers for header in headers], "; "),
        answerer=first.header.identity.answerer if len({header.answerer for header in headers}) == 1 else "",
    )
    CacheWriter.create_or_open(merge.out.path, identity, tokenizer)


def _joined(values: Sequence[str | None], separator: str) -> str | None:
    """Join what the caches say, each once; what one does not say is said to be unknown, unless none says anything."""
    distinct = list(dict.fromkeys(value or "unknown" for value in values))
    return None if distinct == ["unknown"] else separator.join(distinct)


def how_made(result: Mapping[str, Any], without: str) -> str:
    """Say in brackets how the parts came, some of them rewritten `without` some rows."""
    how = [f"{result[name]:,} files {name}" for name in ("linked", "copied") if result[name]]
    how += [f"{result['rewritten']:,} parts rewritten without {without}"] if result["rewritten"] else []
    how = ["it was there already"] if result["existed"] else how
    return f" ({', '.join(how)})" if how else ""


def merge_text(result: dict[str, Any]) -> str:
    """Say for people what a merge did."""
    lines = [
        f"{result['cache']}: {result['rows']:,} rows in {result['parts']:,} parts from {len(result['inputs'])} caches"
        + how_made(result, "repeated rows")
    ]
    for entry in result["inputs"]:
        repeated = (
            f", {entry['dropped']:,} left out because an earlier row has the same row_key" if entry["dropped"] else ""
        )
        lines.append(f"  {entry['path']}: {entry['rows']:,} rows{repeated}")
    for name in result["layers"]:
        missing = result["unscored"].get(name)
        lines.append(
            f"  targets {name} merged" + (f"; {missing:,} parts are not scored, as in the inputs" if missing else "")
        )
    for entry in result["left_out"]:
        why = f"it is not in {', '.join(entry['not_in'])}" if entry["not_in"] else "it was not asked for"
        lines.append(f"  targets {entry['layer']} left out: {why}")
    for name in result["hidden_left_out"]:
        lines.append(
            f"  hidden {name} left out: hidden layers are not merged; 'decant teach' with its capture.hidden adds one"
        )
    lines += [
        f"  {path} is an unfinished merge of other caches; delete it unless it is to be continued"
        for path in result["unfinished"]
    ]
    return "\n".join(lines)

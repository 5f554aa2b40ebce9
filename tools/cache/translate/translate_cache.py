"""`decant cache translate`: a cache in the student's tokenizer, from a cache and a tokenizer alone.

Two passes over the rows. The first writes each anew (student_rows.py) and counts where tokens are joined by what
follows (vocabulary_map.py, `BoundaryStability`); the second carries the distributions over (projection.py) and commits
a part for each part. Where the student's tokenizer is the teacher's under other ids, or the very same, targets are
renamed and stay bit for bit what they were, all temperatures and draws included. Written beside OUT and renamed; a
killed command is continued by the same one. Cost: two tokenizations of every row and one decode and encode; memory: one
part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.cache.cache import Cache, ReadPart
from shared.cache.layout import list_hidden_layers, sequences_dir
from shared.cache.tokenizer_files import tokenizer_without_code
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.identity.weights_hash import tokenizer_hash
from shared.models.files import load_fast_tokenizer
from shared.parts.part_stats import add_figures
from shared.parts.records import list_records, read_record
from shared.parts.sequences import SequenceRow
from shared.payload.targets import SparseTargets
from teacher_cache.teacher.model_files import tokenizer_files
from teacher_cache.teacher.teacher_identity import software, template_hash
from tools.cache.staged_directory import DerivedCache
from tools.cache.translate.projection import Projection, RowPair, renamed
from tools.cache.translate.student_rows import StudentRows, UntranslatableError
from tools.cache.translate.vocabulary_map import BoundaryStability, VocabularyMap

BY_BYTES, RENAMED = "bytes-1", "renamed-1"
"""How a derived layer was made, as its identity says; another rule gets another name."""
NO_TEMPLATE = xxhash.xxh3_128_hexdigest(b"")
"""What a translation is named by where its tokenizer has no template."""


def translate_cache(
    source: Path,
    out: Path,
    tokenizer: str,
    *,
    targets: str | None = None,
    chat_template: str | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Derive a cache in another tokenizer.

    Args:
        source: the cache.
        out: the new one; must not exist, or be the result of the same command.
        tokenizer: a directory with the student's tokenizer, or a hub id.
        targets: the layer to carry over; None for the only one, or none where the cache has none.
        chat_template: Jinja text in place of the tokenizer's own template.
        advance: called with the rows that are done; every row counts twice.

    Returns:
        cache, job, existed, rows, parts, set_aside (count by reason), hidden_left_out, layer; with a layer also method,
        positions, positions_with_head, placed_mass and teacher_mass (means over positions with a head),
        likelihood_unknown (positions).

    Raises:
        CacheError: the cache, the tokenizer or its template is not of a kind that can be translated with, or `out` is
            something else.
    """
    cache = Cache.open(source, targets)
    _refuse_derived(cache)
    loaded = load_fast_tokenizer(tokenizer, trust_remote_code=False)
    files = tokenizer_files(loaded)
    before = cache.sequences_identity
    vocabulary_map = VocabularyMap(tokenizer_without_code(source)["tokenizer.json"], files["tokenizer.json"])
    other_ids = vocabulary_map.other_ids(max(before.vocab_size, cache.layer.vocab_size if cache.layer else 0))
    if other_ids is None:
        _refuse_without_mass(cache)
    rows = StudentRows(source, loaded, vocabulary_map, other_ids, chat_template)
    template = chat_template or loaded.chat_template
    hashed = tokenizer_hash(files["tokenizer.json"])
    said = {"cache": cache.cache_id, "tokenizer": hashed, "template": template_hash(template, out) or NO_TEMPLATE}
    request = {"translate": {**said, "method": BY_BYTES}}
    derived = DerivedCache.of(out, "translating", "a translation of this cache as it is now", request)
    if not derived.existed:
        stability, ids = _count(cache, rows, vocabulary_map, other_ids, advance)
        if ids is None:
            _refuse_without_mass(cache)
        is_equal = hashed == before.tokenizer_hash
        identity = replace(
            before,
            tokenizer_hash=hashed,
            vocab_size=before.vocab_size if is_equal else len(vocabulary_map.student),
            template=said["template"] if template else "",
            tokenizer=tokenizer,
        )
        with derived.written():
            writer = CacheWriter.create_or_open(derived.path, identity, files)
            _write(cache, rows, vocabulary_map, stability, ids, writer, derived, advance)
    done = {"cache": str(out), "job": derived.job, "existed": derived.existed, **_summary(out)}
    return done | {"hidden_left_out": sorted(list_hidden_layers(source))}


def _refuse_derived(cache: Cache) -> None:
    """Refuse a layer that is a translation itself."""
    layer = cache.layer
    if layer is not None and layer.derived_from:
        raise CacheError(
            f"{cache.path}: layer {cache.layer_name} was itself derived from {layer.derived_from} "
            f"({layer.method}); translate the cache that the teacher wrote"
        )


def _refuse_without_mass(cache: Cache) -> None:
    """Refuse a layer that cannot be carried over by bytes: of draws alone, or of heads beside an unknown mass."""
    layer = cache.layer
    if layer is not None and layer.mode == "sample":
        raise CacheError(
            f"{cache.path}: layer {cache.layer_name} has drawn tokens and no head, which tell too little of what the "
            "text would begin with; name a layer of mode top or top+sample with --targets"
        )
    if layer is not None and layer.tail == "unknown":
        raise CacheError(
            f"{cache.path}: layer {cache.layer_name} does not know the mass outside its heads, so what cannot be "
            "placed has no bucket to join; translate a layer whose tail is known"
        )


def _pairs(
    cache: Cache, rows: StudentRows, part: ReadPart
) -> Iterator[tuple[int, SequenceRow, SequenceRow, RowPair] | str]:
    """Yield index, row, translated row and both aligned, of each row of a part; or why it cannot be translated."""
    planned = rows.planned(part.record.stem)
    for index in part.rows:
        row = cache.sequence(index)
        try:
            translated = rows.row(row, planned.get(row.row_key))
            yield index, row, translated, rows.pair(row, translated)
        except UntranslatableError as error:
            yield str(error)


def _count(
    cache: Cache,
    rows: StudentRows,
    vocabulary_map: VocabularyMap,
    ids: NDArray[np.int32] | None,
    advance: Callable[[int], None],
) -> tuple[BoundaryStability, NDArray[np.int32] | None]:
    """Go through all rows once; `ids` is what `VocabularyMap.other_ids` returned.

    Returns:
        How often tokens stay as they are, and `ids` where every row has only other ids.

    Raises:
        CacheError: no row can be translated.
    """
    seen, kept = (np.zeros(len(vocabulary_map.student), np.int64) for _ in range(2))
    reasons, done = Counter[str](), 0
    for part in cache.parts():
        for found in _pairs(cache, rows, part):
            advance(1)
            if isinstance(found, str):
                reasons[found] += 1
                continue
            pair, done = found[3], done + 1
            _count_row(pair, vocabulary_map, seen, kept)
            if ids is not None and not np.array_equal(ids[pair.teacher_ids], pair.student_ids):
                ids = None
    if not done and len(cache):
        raise CacheError(f"{cache.path}: no row can be translated; the first reason is: {next(iter(reasons))}")
    return BoundaryStability(seen, kept), ids


def _count_row(pair: RowPair, vocabulary_map: VocabularyMap, seen: NDArray[np.int64], kept: NDArray[np.int64]) -> None:
    """Count where a teacher's token ends at the end of a student's, and whether the student stops there."""
    for teacher, teacher_end, student, _, is_whole in pair.cuts.tolist():
        ours = int(pair.student_ids[student])
        if not is_whole or ours == pair.ends[1]:
            continue
        text, goal = b"", vocabulary_map.student_bytes(ours)
        for told in pair.teacher_ids[teacher:teacher_end].tolist():
            text += vocabulary_map.teacher_bytes(told)
            if len(text) >= len(goal):
                break
            to = vocabulary_map.first(text)
            if to >= 0 and len(vocabulary_map.student_bytes(to)) == len(text):
                seen[to] += 1
        if text == goal:
            seen[ours] += 1
            kept[ours] += 1


def _write(
    cache: Cache,
    rows: StudentRows,
    vocabulary_map: VocabularyMap,
    stability: BoundaryStability,
    ids: NDArray[np.int32] | None,
    writer: CacheWriter,
    out: DerivedCache,
    advance: Callable[[int], None],
) -> None:
    """Commit a part for each part of the cache."""
    layer, projection = None, None
    if cache.layer is not None:
        derived = _layer_identity(cache, writer.identity, is_renamed=ids is not None)
        short = str(cache.layer_name).rsplit("-", 1)[0]
        layer = LayerWriter.create_or_open(
            writer, short, derived, {**cache.layer_provenance, "derived_by": dict(software())}
        )
        projection = Projection(vocabulary_map, stability, cache.layer.vocab_size, derived.k)
    for number, part in enumerate(cache.parts()):
        stem = out.stem(number)
        advance(len(part.rows))
        done = layer.directory if layer else sequences_dir(writer.path)
        if (done / f"{stem}.json").exists():
            read_record(done / f"{stem}.json")
            continue
        pairs = list(_pairs(cache, rows, part))
        aside = [{"reason": found} for found in pairs if isinstance(found, str)]
        whole = [found for found in pairs if not isinstance(found, str)]
        writer.write_sequences(stem, [translated for _, _, translated, _ in whole], software(), aside)
        if layer is not None and projection is not None:
            before = [cache.targets_of(index, row) for index, row, _, _ in whole]
            after = [
                projection.row(targets, pair) if ids is None else renamed(targets, ids)
                for targets, (_, _, _, pair) in zip(before, whole, strict=True)
            ]
            keys = [translated.key for _, _, translated, _ in whole]
            layer.write(stem, keys, after, software(), _placed(before, after, whole))


def _layer_identity(cache: Cache, identity: SequencesIdentity, *, is_renamed: bool) -> LayerIdentity:
    """Return what the derived layer is."""
    layer = cache.layer
    assert layer is not None
    derived = replace(
        layer,
        tokenizer_hash=identity.tokenizer_hash,
        derived_from=str(cache.layer_name),
        method=RENAMED if is_renamed else BY_BYTES,
    )
    if is_renamed:
        return derived
    plain = replace(derived, mode="top", draws=0, temperatures=(1.0,), draw_key="context")
    return replace(plain, vocab_size=identity.vocab_size, tail="derived", k=layer.most_entries, label="apart")


def _placed(before: Sequence[SparseTargets], after: Sequence[SparseTargets], whole: Sequence[Any]) -> dict[str, float]:
    """Return what was placed of the teacher's heads, over the positions that have one now."""
    placed = told = 0.0
    for old, new, (_, _, _, pair) in zip(before, after, whole, strict=True):
        cuts = pair.cuts[new.counts[pair.cuts[:, 2]] > 0]
        unit = new.temperatures.index(1.0)
        placed += float(-np.expm1(new.tail_logmass[cuts[:, 2], unit].astype(np.float64)).sum())
        told += float(-np.expm1(old.tail_logmass[cuts[:, 0], old.temperatures.index(1.0)].astype(np.float64)).sum())
    return {"placed_mass_sum": placed, "teacher_mass_sum": told}


def _summary(out: Path) -> dict[str, Any]:
    """Return what the records of a translated cache say."""
    records = list_records(sequences_dir(out))
    reasons = Counter(str(item["reason"]) for record in records for item in record.set_aside)
    cache = Cache.open(out)
    found = {"rows": len(cache), "parts": len(records), "set_aside": dict(reasons.most_common()), "layer": None}
    if cache.layer is None:
        return found
    total: dict[str, Any] = {}
    for record in list_records(out / "targets" / str(cache.layer_name)):
        add_figures(total, record.stats)
    with_head = total["positions"] - total["support_histogram"][0]
    return found | {
        "layer": cache.layer_name,
        "method": cache.layer.method,
        "positions": total["positions"],
        "positions_with_head": with_head,
        "likelihood_unknown": total["impossible_labels"],
        "teacher_mass": total["teacher_mass_sum"] / max(with_head, 1),
        "placed_mass": total["placed_mass_sum"] / max(with_head, 1),
    }


def translate_text(result: dict[str, Any]) -> str:
    """Say for people what a translation made."""
    there = "; it was there already" if result["existed"] else ""
    lines = [f"{result['cache']}: {result['rows']:,} rows in {result['parts']:,} parts{there}"]
    lines += [f"  set aside: {count:,} rows, {reason}" for reason, count in result["set_aside"].items()]
    lines += [f"  hidden {name} left out: its states are of the teacher's tokens" for name in result["hidden_left_out"]]
    if result["layer"] is None:
        return "\n".join([*lines, "  no targets layer"])
    positions = max(result["positions"], 1)
    lines.append(
        f"  targets {result['layer']} ({result['method']}): {result['positions_with_head']:,} of "
        f"{result['positions']:,} positions have a head ({100 * result['positions_with_head'] / positions:.1f} %), "
        f"with {100 * result['placed_mass']:.2f} % of the mass where the teacher's had "
        f"{100 * result['teacher_mass']:.2f} %"
    )
    unknown = result["likelihood_unknown"]
    lines += (
        [f"  {unknown:,} positions stand for other bytes than the teacher's and are not aligned"] if unknown else []
    )
    return "\n".join(lines)

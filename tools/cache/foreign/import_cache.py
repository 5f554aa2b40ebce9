"""`decant cache import` of what others made: rows and targets become a cache that says what it does not know.

Rows are taken in the order of the files and committed part by part into a directory beside OUT, which is renamed at the
end; a killed import is continued by the same command, which reads again and writes only what is missing. The teacher's
weights are not here: the layer's `weights_hash` is that of the teacher's name, so that layers of two teachers stay two.
Memory: the rows of one part. Cost: the codec's, beside that of reading the format.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.cache.groups import GroupRule, question_key
from shared.cache.layout import list_layers, sequences_dir
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.growing_key_set import GrowingKeySet
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError, DamagedError, first_line
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.identity.weights_hash import tokenizer_hash
from shared.keys import content_key
from shared.parts.records import list_records
from shared.parts.sequences import SequenceRow, make_row
from shared.payload.targets import SparseTargets
from shared.tokens.tokenizer_file import num_ids
from tools.cache.cache_show import TAIL_MEANS
from tools.cache.foreign.foreign_row import ForeignReader, ForeignRow, check_row
from tools.cache.foreign.heads import to_targets
from tools.cache.staged_directory import DerivedCache

_MOST_ROWS, _MOST_ENTRIES, _MOST_TOKENS = 512, 2**23, 2**24
"""Of a part; entries and tokens bound the memory."""
_MOST_SET_ASIDE = 1000
"""Rows set aside that a part lists by place."""
_ASIDE = "set aside: "
"""Begins what counts rows by the reason for which they are left out."""
GROUPS: GroupRule = "first question"


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What the user says about a foreign cache."""

    tokenizer: Any
    """Of transformers."""
    tokenizer_files: Mapping[str, bytes]
    tokenizer_name: str
    teacher: str
    source: str
    licence: str | None
    tail: str | None
    """derived or unknown, where the user knows better than the format."""

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer."""
        return tokenizer_hash(self.tokenizer_files["tokenizer.json"])


@dataclass(slots=True)
class _Part:
    """Rows that will be committed together."""

    rows: list[SequenceRow] = field(default_factory=list)
    targets: list[SparseTargets] = field(default_factory=list)
    set_aside: list[dict[str, str]] = field(default_factory=list)
    entries: int = 0
    tokens: int = 0

    @property
    def is_full(self) -> bool:
        many = self.entries >= _MOST_ENTRIES or self.tokens >= _MOST_TOKENS
        return many or len(self.rows) >= _MOST_ROWS or len(self.set_aside) >= _MOST_SET_ASIDE


def import_foreign(
    reader: ForeignReader,
    out: Path,
    settings: ImportSettings,
    fingerprint: Mapping[str, Any],
    software: Mapping[str, Any],
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Make a cache of a foreign one.

    Args:
        reader: of its format.
        out: the new cache; must not exist, or be the same import.
        settings: what the user says about it.
        fingerprint: files and options; equal ones are the same import.
        software: versions, for the records.
        advance: called with the rows that are done.

    Returns:
        cache, job, rows, positions, parts, layer, format, tail, labels, notes, existed; of a new one also set_aside
        (reason -> rows) and counts of positions: in_head, above_one, divided, and outside (entries).

    Raises:
        DamagedError: a file contradicts its format, or ids the tokenizer.
        CacheError: there is no usable row, `out` is something else, or it cannot be written.
    """
    request = {"import": dict(fingerprint), "tokenizer": settings.tokenizer_hash}
    derived = DerivedCache.of(out, "importing", "an import of these files as they are now", request)
    counts: Counter[str] = Counter()
    if not derived.existed:
        vocab_size = num_ids(settings.tokenizer)
        vocab_size = min(vocab_size, reader.vocab_size or vocab_size)
        sequences, targets = (
            _sequences_identity(settings, reader, vocab_size),
            _layer_identity(settings, reader, vocab_size),
        )
        with derived.written():
            writer = CacheWriter.create_or_open(derived.path, sequences, settings.tokenizer_files)
            layer = LayerWriter.create_or_open(writer, None, targets, _provenance(settings, reader), make=False)
            try:
                for number, part in enumerate(_parts(reader, settings, vocab_size, targets.tail, counts)):
                    _commit(writer, layer, derived.stem(number), part, software)
                    advance(len(part.rows))
            except DamagedError:
                shutil.rmtree(derived.path)  # files that were mended are other files: no command would go on from it
                raise
            if not counts["rows"]:
                shutil.rmtree(derived.path)
                listed = (f"{rows:,} {reason}" for reason, rows in counts.items() if reason.startswith(_ASIDE))
                reasons = "; ".join(listed) or "the files hold none"
                raise CacheError(f"{out}: no row can be used ({reasons}); nothing was made")
    return _summary(derived, reader, counts)


def _sequences_identity(settings: ImportSettings, reader: ForeignReader, vocab_size: int) -> SequencesIdentity:
    template = str(settings.tokenizer.chat_template or "")
    return SequencesIdentity(
        tokenizer_hash=settings.tokenizer_hash,
        vocab_size=vocab_size,
        template=xxhash.xxh3_128_hexdigest(template.encode()) if template else "",
        tokenizer=settings.tokenizer_name,
        licence=settings.licence,
        answers=f"imported from {reader.form}",
        groups=GROUPS,
    )


def _layer_identity(settings: ImportSettings, reader: ForeignReader, vocab_size: int) -> LayerIdentity:
    return LayerIdentity(
        teacher=settings.teacher,
        weights_hash=xxhash.xxh3_128_hexdigest(f"a teacher named {settings.teacher}".encode()),
        tokenizer_hash=settings.tokenizer_hash,
        vocab_size=vocab_size,
        mode="top",
        k=max(reader.k, 1),
        dtype="unknown",
        head_dtype="unknown",
        tail=settings.tail or reader.tail,  # type: ignore[arg-type]
        labels=reader.labels,  # type: ignore[arg-type]
    )


def _provenance(settings: ImportSettings, reader: ForeignReader) -> dict[str, Any]:
    said = "the user" if settings.tail else "the format"
    return {"imported from": reader.form, "tail said by": said, **reader.notes}


def _parts(
    reader: ForeignReader, settings: ImportSettings, vocab_size: int, tail: str, counts: Counter[str]
) -> Iterator[_Part]:
    """Yield parts; the same files give the same parts."""
    part, known = _Part(), GrowingKeySet()
    for row in reader.rows():
        check_row(row)
        _refuse_other_tokenizer(row, vocab_size)
        reason = None if len(row.predicted) else "no token of it has a distribution"
        made = None if reason else _sequence(row, settings)
        if made is not None and not known.add(made.row_key):
            reason = "an earlier row has the same tokens"
        if reason or made is None:
            counts[f"{_ASIDE}{reason}"] += 1
            part.set_aside.append({"reason": str(reason), "where": row.where})
        else:
            part.rows.append(made)
            part.targets.append(to_targets(row, vocab_size, tail=tail, counts=counts))
            part.entries, part.tokens = part.entries + row.ids.size, part.tokens + len(row.token_ids)
            counts["rows"] += 1
        if part.is_full:
            yield part
            part = _Part()
    for reason, rows in getattr(reader, "set_aside", {}).items():
        counts[f"{_ASIDE}{reason}"] += rows
        part.set_aside.append({"reason": reason, "rows": str(rows)})
    if part.rows or part.set_aside:
        yield part


def _refuse_other_tokenizer(row: ForeignRow, vocab_size: int) -> None:
    highest = int(row.token_ids.max(initial=-1))
    if highest >= vocab_size:
        raise DamagedError(
            f"{row.where} has token id {highest} and the tokenizer {vocab_size:,} entries; name the tokenizer that "
            "made the rows (--tokenizer)"
        )


def _sequence(row: ForeignRow, settings: ImportSettings) -> SequenceRow:
    """Return a row's sequence; texts that the format does not have are spelled from the tokens."""
    cuts = np.flatnonzero(np.diff(row.predicted) != 1) + 1
    spans = [(int(run[0]), int(run[-1]) + 1) for run in np.split(row.predicted, cuts)]
    token_ids = row.token_ids.astype(np.int32)
    whole = spans[0][0] == 1 and row.response is None
    prompt = row.prompt
    if prompt is None:
        prompt = settings.tokenizer.decode(token_ids if whole else token_ids[: spans[0][0]])
    response = row.response
    if response is None:
        response = "" if whole else settings.tokenizer.decode(token_ids[row.predicted])
    key = content_key(token_ids, np.array(spans, np.int32))
    return make_row(
        row_key=xxhash.xxh3_128_digest(b"imported" + key),
        group_key=question_key(row.question or prompt, GROUPS),
        source=row.source or settings.source,
        prompt=prompt,
        response=response,
        reference=None,
        token_ids=token_ids,
        spans=spans,
        finish_reason=row.finish_reason,
    )


def _commit(writer: CacheWriter, layer: LayerWriter, stem: str, part: _Part, software: Mapping[str, Any]) -> None:
    """Commit a part where a killed import did not."""
    try:
        if not (sequences_dir(writer.path) / f"{stem}.json").exists():
            writer.write_sequences(stem, part.rows, software, part.set_aside)
        if not (layer.directory / f"{stem}.json").exists():
            layer.write(stem, [row.key for row in part.rows], part.targets, software)
    except ValueError as error:
        raise DamagedError(f"{stem} cannot be made: {first_line(error)}") from None


def _summary(derived: DerivedCache, reader: ForeignReader, counts: Counter[str]) -> dict[str, Any]:
    out = derived.out
    ((name, layer),) = list_layers(out).items()
    records, targets = list_records(sequences_dir(out)), list_records(layer.directory)
    found = {
        "cache": str(out),
        "job": derived.job,
        "existed": derived.existed,
        "rows": sum(record.rows for record in records),
        "positions": sum(record.positions for record in records),
        "parts": len(records),
        "layer": name,
        "format": reader.form,
        "tail": layer.identity.tail,
        "labels": layer.identity.labels,
        "notes": dict(reader.notes),
        "bytes_per_position": sum(r.bytes for r in targets) / max(sum(r.positions for r in targets), 1),
    }
    if derived.existed:
        return found
    set_aside = {name.removeprefix(_ASIDE): n for name, n in counts.items() if name.startswith(_ASIDE)}
    figures = {name: counts[name] for name in ("in_head", "above_one", "divided", "outside")}
    return {**found, "set_aside": set_aside, **figures}


def foreign_text(result: Mapping[str, Any]) -> str:
    """Say for people what an import made, and what it does not know."""
    there = "; it was there already" if result["existed"] else ""
    rows, positions = f"{result['rows']:,} rows", f"{result['positions']:,} positions"
    lines = [
        f"{result['cache']}: {rows}, {positions} in {result['parts']:,} parts from {result['format']}, targets "
        f"{result['layer']}, {result['bytes_per_position']:,.1f} bytes per position{there}",
        f"  tail {result['tail']}: {TAIL_MEANS[result['tail']]}",
    ]
    if result["labels"] == "head":
        lines.append("  labels: their log-probability is known where the head names them")
    lines += [f"  {name}: {value}" for name, value in result["notes"].items() if value and name != "settings"]
    lines += [f"  {rows:,} rows set aside: {reason}" for reason, rows in result.get("set_aside", {}).items()]
    if not result["existed"]:
        share = result["in_head"] / max(result["positions"], 1)
        doubt = "; so few suggest another tokenizer, or rows that are shifted" if share < 0.3 else ""
        lines.append(f"  {share:.1%} of the tokens are among the teacher's entries{doubt}")
        lines += [f"  {result[name]:,} {text}" for name, text in _COUNTED.items() if result[name]]
    return "\n".join(lines)


_COUNTED = {
    "above_one": "positions weigh more than 1 by rounding; their tail is empty",
    "divided": "positions were divided by their sum",
    "outside": "entries name ids that the tokenizer does not have; they are in the tail",
}

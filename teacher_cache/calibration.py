"""A short real build that measures what a long one will take: the recipe's prompts, its engine, a temporary cache.

One started engine does two builds, a quarter of the sample and then the rest (where another model answers, each build
starts both in turn, since one memory seldom holds two). A straight line through the two gives each pass a fixed time
(the first wave of answers that fills the engine, the last ones that leave it half empty) and a rate; the engine's start
is a term of its own. So a sample that is mostly ramp still extrapolates. The sample is spread over the prompts by a
hash, in proportion to each entry's rows, and the second build shares no prompt with the first.
Cost: an engine start and the sample's rows; the temporary cache is removed.
"""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.cache.layout import list_layers, read_header, sequences_dir
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.cache.writing.cache_writer import CacheWriter
from shared.errors import UsageError
from shared.keys import canonical_json, row_key
from shared.parts.mapped_part import MappedSequences
from shared.parts.records import PartRecord, list_records
from shared.parts.sequences import SequenceRow, make_row
from shared.progress import BuildProgress
from shared.recipe.recipe import PromptSource, Recipe
from teacher_cache import engines
from teacher_cache.build import teach
from teacher_cache.engines.protocol import Engine
from teacher_cache.passes.summary import PassFigures
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts

PLAIN: dict[str, Any] = {"limit": None, "config": None, "columns": {}, "ignore": ()}
"""Settings of a source whose rows are read already."""
FIRST_SHARE = 0.25
"""Of the sample goes to the first build."""


@dataclass(frozen=True, slots=True)
class PassRate:
    """What one pass takes: `fixed_seconds` once, then `tokens_per_second`."""

    fixed_seconds: float
    tokens_per_second: float

    def seconds(self, tokens: float) -> float:
        """Return seconds for so many tokens on one engine; 0 for none."""
        return self.fixed_seconds + tokens / self.tokens_per_second if tokens else 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a sample measured."""

    rows: int
    """Rows that were built."""
    seconds: float
    """Wall time of it all, the engine's start included."""
    start_seconds: float
    generate: PassRate | None
    """Tokens are those of answers; None where answers are given."""
    score: PassRate
    """Tokens are those of whole sequences."""
    rows_by_source: dict[str, int]
    tokens_by_source: dict[str, int]
    """Tokens of whole sequences."""
    positions_by_source: dict[str, int]
    """Supervised positions: with `generate`, tokens of the answers."""
    target_bytes_per_position: float
    sequence_bytes_per_token: float
    record_bytes_per_part: float
    """Both commit records."""
    mean_support: float
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the engine says about itself."""


def calibrate(recipe: Recipe, num_rows: int, progress: BuildProgress | None = None) -> Calibration:
    """Build a sample twice as described and measure it.

    Args:
        recipe: with a teacher, and prompts or an existing cache to score.
        num_rows: rows of the sample, at least 8.
        progress: receives rows and tokens as they are done.

    Raises:
        UsageError: there is nothing to sample.
        DecantError: whatever stops a build.
    """
    if recipe.teacher is None:
        raise UsageError("the recipe has no `teacher` section; there is no engine to measure")
    with tempfile.TemporaryDirectory(prefix="decant-calibration-") as directory:
        root = Path(directory)
        capture = recipe.capture.model_copy(update={"hidden": None})
        recipe = recipe.model_copy(update={"capture": capture, "output_dir": root / "run"})
        samples = _prompt_samples(recipe, root, num_rows) if recipe.prompts else _cache_samples(recipe, root, num_rows)
        kept = _KeptEngine()
        opener = kept.open if recipe.generate is None or recipe.generate.model is None else None
        try:
            summaries = [teach(one, progress=progress, max_set_aside=1.0, open_engine=opener) for one in samples]
        finally:
            kept.end()
        caches = [sample.cache[0] for sample in samples]
        start_seconds = max(summary.seconds_starting for summary in summaries)
        return Calibration(
            rows=sum(summary.scored.rows for summary in summaries),
            seconds=sum(summary.seconds for summary in summaries),
            start_seconds=start_seconds,
            generate=line_through([s.generated for s in summaries]) if recipe.generate is not None else None,
            score=line_through([s.scored for s in summaries]),
            **_sizes(caches),
        )


class _KeptEngine:
    """An engine that the first build opens and that outlives the builds that close it."""

    max_model_len: int

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def open(self, *settings: Any, **named: Any) -> Engine:
        """Open it, or return it as it is."""
        if self._engine is None:
            self._engine = engines.open_engine(*settings, **named)
            self.max_model_len, self.provenance = self._engine.max_model_len, self._engine.provenance
            self.generate, self.score = self._engine.generate, self._engine.score
        return self

    def close(self) -> None:
        """Leave it open."""

    def end(self) -> None:
        """Close it, if it was opened."""
        if self._engine is not None:
            self._engine.close()


def line_through(figures: Sequence[PassFigures]) -> PassRate:
    """Return the fixed seconds and the rate of builds of several sizes; without a fixed part where they contradict one.

    Raises:
        UsageError: nothing was done.
    """
    tokens, seconds = sum(f.tokens for f in figures), sum(f.seconds for f in figures)
    if not tokens or not seconds:
        raise UsageError(
            "no row of the sample could be used; look at what `decant plan` without --calibrate says of the prompts"
        )
    first, last = figures[0], figures[-1]
    more, longer = last.tokens - first.tokens, last.seconds - first.seconds
    if more > 0 and longer > 0 and first.tokens:
        fixed = first.seconds - first.tokens * longer / more
        if fixed > 0:
            return PassRate(fixed, more / longer)
    return PassRate(0.0, tokens / seconds)


def _prompt_samples(recipe: Recipe, root: Path, num_rows: int) -> list[Recipe]:
    """Return two recipes over disjoint samples of the prompts, each with a cache of its own."""
    answers = recipe.generate.samples_per_prompt if recipe.generate else 1
    chosen = sample_conversations(recipe, max(2, num_rows // answers))
    recipes = []
    for name, rows in zip(("first", "second"), _divided(chosen), strict=True):
        sources = []
        for origin, source in enumerate(recipe.prompts):
            own = [row for row in rows if row.origin == origin]
            if own and own[0].sequence is not None:
                sources.append(
                    source.model_copy(update={"path": str(_as_cache(source, root / f"{name}-{origin}", own))})
                )
            elif own:
                path = root / f"{name}-{origin}.jsonl"
                path.write_text("".join(json.dumps(_as_row(row)) + "\n" for row in own), encoding="utf-8")
                sources.append(_source_of(source, path, own[0]))
        recipes.append(recipe.model_copy(update={"prompts": tuple(sources), "cache": (root / name,)}))
    return recipes


def sample_conversations(recipe: Recipe, num_rows: int) -> list[Conversation]:
    """Return about `num_rows` conversations, each entry of `prompts` in proportion to its rows, chosen by a hash of
    content and position.

    Memory: `num_rows` conversations per entry.

    Raises:
        PromptError: a source cannot be read.
        UsageError: fewer than two conversations can be used.
    """
    kept: dict[int, list[tuple[int, int, Conversation]]] = {}
    counts: Counter[int] = Counter()
    for number, row in enumerate(read_prompts(recipe.prompts, Problems())):
        counts[row.origin] += 1
        heap = kept.setdefault(row.origin, [])
        content = canonical_json([counts[row.origin], _as_row(row)])  # not the file's name: everywhere the same sample
        item = (-xxhash.xxh3_64_intdigest(content, seed=row.origin), number, row)
        if len(heap) < num_rows:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    total = sum(counts.values())
    chosen: list[tuple[int, int, Conversation]] = []
    for origin, heap in kept.items():
        share = max(1, round(num_rows * counts[origin] / total))
        chosen += heapq.nlargest(share, heap)
    if len(chosen) < 2:
        raise UsageError(f"{total} prompts are too few to measure anything; run `decant teach` itself")
    return [row for *_, row in sorted(chosen, reverse=True)]


def _divided(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """Cut a sample in two, the first share smaller; at least one each."""
    first = max(1, round(len(rows) * FIRST_SHARE))
    return rows[:first], rows[first:]


def _as_row(row: Conversation) -> dict[str, Any]:
    """Return a conversation in the form that `format: messages` or `text` reads; of a cache's row, what tells it."""
    if row.sequence is not None:
        return {"tokens": row.sequence.token_ids, "spans": row.sequence.spans}
    content: dict[str, Any] = {"text": row.text}
    if row.messages is not None:
        tools = [json.loads(message["content"]) for message in row.messages if message["role"] == "tools"]
        content = {"messages": row.messages[len(tools) :], **({"tools": tools[0]} if tools else {})}
    return content if row.reference is None else {**content, "reference": row.reference}


def _as_cache(source: PromptSource, path: Path, rows: Sequence[Conversation]) -> Path:
    """Write rows that a cache gave as a cache that `format: cache` reads, and return where."""
    header = read_header(Path(source.path))
    writer = CacheWriter.create_or_open(path, header.identity, read_tokenizer_files(Path(source.path)))
    taken = [
        make_row(
            row_key=row_key(row.sequence.group_key, None, index, row.place),
            group_key=row.sequence.group_key,
            source=row.source,
            prompt=row.sequence.prompt,
            response=row.sequence.response,
            reference=row.reference,
            token_ids=row.sequence.token_ids,
            spans=np.asarray(row.sequence.spans, dtype=np.int32),
            finish_reason=row.sequence.finish_reason,
        )
        for index, row in enumerate(rows)
        if row.sequence is not None
    ]
    writer.write_sequences("part-00000000-000000", taken, {})
    return path


def _source_of(source: PromptSource, path: Path, row: Conversation) -> PromptSource:
    kind = "messages" if row.messages is not None else "text"
    return source.model_copy(update={"path": str(path), "format": kind, "split": "train", **PLAIN})


def _cache_samples(recipe: Recipe, root: Path, num_rows: int) -> list[Recipe]:
    """Return two recipes that score disjoint samples of an existing cache's rows."""
    origin = recipe.cache[0]
    header = read_header(origin)
    files = read_tokenizer_files(origin)
    recipes = []
    for name, rows in zip(("first", "second"), _divided(_sample_rows(origin, num_rows)), strict=True):
        writer = CacheWriter.create_or_open(root / name, header.identity, files)
        writer.write_sequences("part-00000000-000000", rows, {})
        recipes.append(recipe.model_copy(update={"cache": (root / name,)}))
    return recipes


def _sample_rows(cache_dir: Path, num_rows: int) -> list[SequenceRow]:
    """Return rows of up to 16 parts, chosen by hash."""
    records = [record for record in list_records(sequences_dir(cache_dir)) if record.rows]
    records = sorted(records, key=lambda record: xxhash.xxh3_64_intdigest(record.xxh3.encode()))[:16]
    parts = [MappedSequences(sequences_dir(cache_dir), record, verify=False) for record in records]
    places = [(part, index) for part in parts for index in range(len(part))]
    order = sorted(range(len(places)), key=lambda i: xxhash.xxh3_64_intdigest(i.to_bytes(8, "little")))
    if len(order) < 2:
        raise UsageError(f"{cache_dir} has too few rows to measure anything; run `decant teach` itself")
    return [places[i][0].row(places[i][1]) for i in order[:num_rows]]


def _sizes(caches: Sequence[Path]) -> dict[str, Any]:
    """Return rows, tokens and positions per source, and what they take on disk."""
    rows, tokens, positions = Counter[str](), Counter[str](), Counter[str]()
    sequences, targets, record_bytes = list[PartRecord](), list[PartRecord](), 0
    for cache in caches:
        (layer,) = list_layers(cache).values()
        found = list_records(sequences_dir(cache))
        for record in found:
            for name, figures in record.stats["sources"].items():
                rows[name] += figures["rows"]
                tokens[name] += figures["tokens"]
                positions[name] += figures["positions"]
            both = (sequences_dir(cache) / f"{record.stem}.json", layer.directory / f"{record.stem}.json")
            record_bytes += sum(path.stat().st_size for path in both)
        sequences += found
        targets += list_records(layer.directory)
    num_positions = max(sum(positions.values()), 1)
    return {
        "rows_by_source": dict(rows),
        "tokens_by_source": dict(tokens),
        "positions_by_source": dict(positions),
        "target_bytes_per_position": sum(record.bytes for record in targets) / num_positions,
        "sequence_bytes_per_token": sum(record.bytes for record in sequences) / max(sum(tokens.values()), 1),
        "record_bytes_per_part": record_bytes / max(len(sequences), 1),
        "mean_support": sum(record.stats["support_sum"] for record in targets) / num_positions,
        "provenance": dict(targets[0].software.get("engine", {})),
    }

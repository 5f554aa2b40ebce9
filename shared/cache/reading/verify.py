"""Check a whole cache: every checksum, key, span, blob and cross-reference, and every figure that a record keeps of its
part.

What is compared: each JSON file with its checksum; tokenizer files with cache.json, and tokenizer.json with
`tokenizer_hash`; each plan's units; each part with its record, the record with what the Arrow file repeats of it and
with figures counted anew; rows with the vocabulary, their keys and their unit of the plan; row_keys with each other;
targets with the layer, the sequences and `teacher_nll_nats`; and what `Cache.open` compares.

Cost: reads everything once and decodes it; about a million positions of 64 entries per second. Memory: one part's
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.atomic import TEMPORARY_MARK
from shared.cache.layout import CacheHeader, HiddenLayer, Layer, all_layers, read_header, sequences_dir
from shared.cache.reading.visible_rows import hidden_rows
from shared.cache.tokenizer_files import check_tokenizer_hash, read_tokenizer_file
from shared.cache.writing.drop import dropping
from shared.errors import CacheError, DamagedError
from shared.keys import KeySet, stack_keys
from shared.parts.cache_files import list_folder
from shared.parts.jobs import Job, list_jobs
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.part_stats import sequences_stats, targets_stats, targets_stats_problem
from shared.parts.records import PartRecord, check_counts, list_records
from shared.parts.repeated_rows import repeated_rows
from shared.payload.quantise import LEAST_LABEL_LOGPROB, MOST_LABEL_ERROR
from shared.payload.targets import SparseTargets

_MOST_PER_PART = 10


def verify_cache(path: Path | str) -> Iterator[str]:
    """Yield one sentence per problem; nothing where every byte that matters is as it was committed.

    At most 10 problems are listed for one part.
    """
    yield from _with_its_end(_problems(Path(path)))


def _with_its_end(problems: Iterator[str]) -> Iterator[str]:
    """Yield what a check finds; the reason for which it cannot go on is its last problem."""
    try:
        yield from problems
    except CacheError as error:
        yield str(error)


def _problems(path: Path) -> Iterator[str]:
    header = read_header(path)
    records = list_records(sequences_dir(path))
    layers = all_layers(path)
    jobs = {job.id8: job for job in list_jobs(path)}
    masks = hidden_rows(path, records)
    begun = dropping(path)
    yield from _with_its_end(_tokenizer_problems(path, header))
    for job in jobs.values():
        yield from _with_its_end(_plan_problems(job))
    said: set[str] = set()
    sound = True
    for record in records:
        found = _sequences_problems(path, record, header.identity.vocab_size, jobs.get(record.id8))
        problems = list(_bounded(found, said))
        sound = sound and not problems
        yield from problems
    if sound:
        yield from _bounded(_repeats(path, records, masks), said)
    for layer in layers:
        by_stem = {record.stem: record for record in records}
        yield from _with_its_end(_layer_problems(path, header, layer, by_stem, begun, said))


def parts_without_layer(path: Path | str) -> dict[str, int]:
    """Return, by layer, how many parts do not say which layer they are of, as versions before that did not.

    Raises:
        CacheError: the cache cannot be read.
    """
    silent = {
        layer.full_name: sum(record.layer is None for record in list_records(layer.directory))
        for layer in all_layers(Path(path))
    }
    return {name: count for name, count in silent.items() if count}


def nll_problem(teacher_nll_nats: float, targets: SparseTargets) -> str | None:
    """Say how `teacher_nll_nats`, summed before labels were rounded, contradicts a row's decoded ones, if it does."""
    labels = targets.label_logprobs.astype(np.float64)
    if not math.isfinite(teacher_nll_nats) or bool(np.isneginf(labels).any()):
        fits = teacher_nll_nats == math.inf and bool(np.isneginf(labels).any())
    else:
        error = MOST_LABEL_ERROR * len(labels) + 1e-5 * (1 + abs(teacher_nll_nats))
        capped = bool((labels <= LEAST_LABEL_LOGPROB).any())  # such labels may have been lower
        fits = -error <= teacher_nll_nats + labels.sum() and (capped or teacher_nll_nats + labels.sum() <= error)
    return None if fits else f"teacher_nll_nats {teacher_nll_nats:.6g} is not that of its labels, {-labels.sum():.6g}"


def _bounded(problems: Iterator[str], said: set[str]) -> Iterator[str]:
    """Yield problems of one part that were not `said` yet: a sequences part is read again for every layer."""
    new = (problem for problem in _with_its_end(problems) if problem not in said)
    for number, problem in enumerate(new):
        said.add(problem)
        if number == _MOST_PER_PART:
            yield f"{problem.split(':', 1)[0]} has more problems; they are not listed"
            return
        yield problem


def _tokenizer_problems(path: Path, header: CacheHeader) -> Iterator[str]:
    listed = header.tokenizer_files
    for name, entry in listed.items():
        try:
            read_tokenizer_file(path, name, entry)
        except CacheError as error:
            yield str(error)
    names = list_folder(path / "tokenizer")
    folders = {name.split("/", 1)[0] for name in listed}
    for name in names:
        if name not in folders and TEMPORARY_MARK not in name:
            yield f"{path / 'tokenizer' / name} is not listed in cache.json, so nothing reads it; delete it"
    check_tokenizer_hash(path, header)


def _plan_problems(job: Job) -> Iterator[str]:
    for unit in range(job.num_units):
        job.unit(unit)
    yield from ()


def _sequences_problems(path: Path, record: PartRecord, vocab_size: int, job: Job | None) -> Iterator[str]:
    part = MappedSequences(sequences_dir(path), record, verify=True, vocab_size=vocab_size)
    part.num_tokens()
    part.sources()
    rows, whole = [], True
    for i in range(len(part)):
        try:
            rows.append(part.row(i))
        except CacheError as error:
            whole = False
            yield str(error)
    if whole and sequences_stats(rows) != record.stats:
        yield f"{part.path} has other rows, tokens or sources than its record counts; restore the record from a copy"
    unit = int(record.stem[14:])
    if job is None or not job.num_units:  # of another cache, or taken over by a merge or an import
        return
    if unit >= job.num_units:
        yield f"{part.path} is unit {unit} of a plan that has {job.num_units}; delete the part with its record"
        return
    planned = KeySet(stack_keys([row.row_key for row in job.unit(unit)]))
    for i in np.flatnonzero(~planned.contains(part.row_keys)).tolist():
        yield f"{part.path}:{i} is no row of unit {unit} of its plan; delete the part with its record and build again"


def _repeats(path: Path, records: list[PartRecord], masks: Mapping[str, Any]) -> Iterator[str]:
    """Yield rows that are shown although an earlier row has their row_key."""
    repeats = repeated_rows([(sequences_dir(path), record) for record in records])
    for number, repeated in repeats.items():
        stem = records[number].stem
        shown = repeated & masks[stem] if stem in masks else repeated
        for row in np.flatnonzero(shown).tolist():
            where = f"{sequences_dir(path) / stem}.arrow:{row}"
            yield f"{where} has the row_key of an earlier row; delete the part with its record"


def _layer_problems(
    path: Path,
    header: CacheHeader,
    layer: Layer | HiddenLayer,
    sequences: dict[str, PartRecord],
    begun: frozenset[str],
    said: set[str],
) -> Iterator[str]:
    records = list_records(layer.directory)
    layer.identity.make_codec()
    if layer.identity.tokenizer_hash != header.identity.tokenizer_hash:
        yield (
            f"{layer.directory / 'layer.json'} says tokenizer {layer.identity.tokenizer_hash} where cache.json says "
            f"{header.identity.tokenizer_hash}; restore both from a copy"
        )
    for record in records:
        found = sequences.get(record.stem)
        if found is None and record.stem in begun:
            continue  # a `cache drop` that was interrupted; nothing reads it
        if found is None:
            yield f"{layer.directory / record.stem}.arrow scores a sequences part that does not exist"
        else:
            yield from _bounded(_blob_problems(path, layer, record, found), said)


def _blob_problems(path: Path, layer: Layer | HiddenLayer, record: PartRecord, sequences: PartRecord) -> Iterator[str]:
    check_counts(layer.directory, record, sequences)
    codec = layer.identity.make_codec()
    blobs = MappedBlobs(layer.directory, record, verify=True)
    part = MappedSequences(sequences_dir(path), sequences, verify=False)
    counted: list[str] = []

    def decoded() -> Iterator[SparseTargets]:
        """Yield the targets that can be read; the problems of other rows go to `counted`."""
        for i in range(len(part)):
            try:
                row = part.row(i)
                content = codec.decode(blobs.blob(i, row), row.num_positions)
                if isinstance(content, SparseTargets):
                    problem = nll_problem(float(blobs.teacher_nll_nats[i]), content)
                    if problem:
                        raise DamagedError(problem)
                    yield content
            except CacheError as error:
                message = str(error)
                counted.append(message if message.startswith(str(path)) else f"{blobs.path}:{i}: {message}")

    figures = targets_stats(decoded(), blobs.blob_bytes())
    yield from counted
    if counted:
        return
    if isinstance(layer, Layer):
        problem = targets_stats_problem(record.stats, figures, layer.identity.gap_step)
    else:
        found = {"rows": len(blobs), "positions": int(blobs.num_positions.sum()), "blob_bytes": blobs.blob_bytes()}
        problem = None if record.stats == found else f"{record.stats} where {found} are counted"
    if problem:
        yield f"{layer.directory / record.stem}.json says {problem}; restore it from a copy"

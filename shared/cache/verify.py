"""Check a whole cache: every checksum, key, span, blob and cross-reference.

Cost: reads everything once and decodes it; about a million positions of 64 entries per second.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.cache.layout import (
    HiddenLayer,
    Layer,
    list_hidden_layers,
    list_layers,
    read_header,
    sequences_dir,
    tokenizer_path,
)
from shared.cache.visible_rows import hidden_rows
from shared.errors import CacheError
from shared.parts.jobs import list_jobs
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.parts import check_file, hash_file
from shared.parts.records import PartRecord, list_records

_MOST_PER_PART = 10


def verify_cache(path: Path | str) -> Iterator[str]:
    """Yield one sentence per problem; nothing where every byte that matters is as it was committed.

    At most 10 problems are listed for one part.
    """
    path = Path(path)
    try:
        header = read_header(path)
        records = list_records(sequences_dir(path))
        layers: list[Layer | HiddenLayer] = [*list_layers(path).values(), *list_hidden_layers(path).values()]
        jobs = list_jobs(path)
        hidden_rows(path, records)
        for job in jobs:
            for unit in range(job.num_units):
                job.unit(unit)
    except CacheError as error:
        yield str(error)
        return
    for name, entry in header.tokenizer_files.items():
        target = tokenizer_path(path, name)
        try:
            if hash_file(target) != (entry["xxh3"], entry["bytes"]):
                yield f"{target} was altered after it was written; restore it from a copy"
        except CacheError as error:
            yield str(error)
    for record in records:
        yield from _bounded(_sequences_problems(path, record, header.identity.vocab_size))
    for layer in layers:
        yield from _layer_problems(path, layer, {record.stem: record for record in records})


def _bounded(problems: Iterator[str]) -> Iterator[str]:
    for number, problem in enumerate(problems):
        if number == _MOST_PER_PART:
            yield f"{problem.split(':', 1)[0]} has more problems; they are not listed"
            return
        yield problem


def _sequences_problems(path: Path, record: PartRecord, vocab_size: int) -> Iterator[str]:
    try:
        part = MappedSequences(sequences_dir(path), record, verify=True)
        part.num_tokens()
        _, sources = part.sources()
    except CacheError as error:
        yield str(error)
        return
    if set(sources) != set(record.stats.get("sources", {})):
        yield f"{part.path} has sources {sorted(sources)} and its record others"
    positions = 0
    for i in range(len(part)):
        try:
            row = part.row(i)
        except CacheError as error:
            yield str(error)
            continue
        positions += row.num_positions
        if len(row.token_ids) and not 0 <= int(row.token_ids.min()) <= int(row.token_ids.max()) < vocab_size:
            yield f"{part.path}:{i} has token ids outside the vocabulary of {vocab_size}"
    if positions != record.positions:
        yield f"{part.path} has {positions} positions where its record says {record.positions}"


def _layer_problems(path: Path, layer: Layer | HiddenLayer, sequences: dict[str, PartRecord]) -> Iterator[str]:
    try:
        records = list_records(layer.directory)
        layer.identity.make_codec()
    except CacheError as error:
        yield str(error)
        return
    for record in records:
        if record.stem not in sequences:
            yield f"{layer.directory / record.stem}.arrow scores a sequences part that does not exist"
        else:
            yield from _bounded(_blob_problems(path, layer, record, sequences[record.stem]))


def _blob_problems(path: Path, layer: Layer | HiddenLayer, record: PartRecord, sequences: PartRecord) -> Iterator[str]:
    codec = layer.identity.make_codec()
    try:
        check_file(layer.directory, record)
        targets = MappedBlobs(layer.directory, record, verify=False)
        part = MappedSequences(sequences_dir(path), sequences, verify=False)
    except CacheError as error:
        yield str(error)
        return
    if len(part) != len(targets):
        yield f"{targets.path} has {len(targets)} rows where its sequences have {len(part)}"
        return
    for i in range(len(part)):
        try:
            row = part.row(i)
            codec.decode(targets.blob(i, row), row.num_positions)
        except CacheError as error:
            message = str(error)
            yield message if message.startswith(str(path)) else f"{targets.path}:{i}: {message}"

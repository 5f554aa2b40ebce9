"""The work list of one build on disk, and the rule that two builds at the same time share.

A job is a request (canonical JSON, whose hash names it) and a plan: rows cut into units of `rows_per_part`, one Arrow
record batch each, created once by exclusive link. Every worker, early or late, reads the same list, so unit i is the
same rows for all, and its part's name follows from it.

Rows that are committed when the plan is made are left out of it. A plan remembers which jobs were complete at that
moment: of those it shares no row. Two jobs of which neither remembers the other may both hold a row; readers then show
the row of the job with the lower id (shared/cache/reading/visible_rows.py).

Cost: planning streams (one batch of rows in memory, 16 bytes per committed row); reading a unit reads its bytes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import compress, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from shared.atomic import fill_exclusive, make_dir
from shared.errors import CacheError, DamagedError, first_line
from shared.keys import KEY_BYTES, KeySet, canonical_json, stack_keys
from shared.parts.cache_files import arrow_name, list_folder, open_regular, parse_json
from shared.parts.headers.arrow_layout import ArrowLayout
from shared.parts.part_stats import Strict
from shared.parts.parts import check_whole, open_part
from shared.parts.records import PartRecord, checked_model, list_records
from shared.schema import JOB_PATTERN, MAX_ROWS_PER_PART, PLAN

_METADATA_KEY = b"decant"
_CHECKSUM_KEY = b"xxh3"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One row of the work list: a prompt that is to be answered, or an answer that is to be taken over."""

    group_key: bytes
    row_key: bytes
    source: str
    line: int
    """Line in the source's file, from 1."""
    sample_index: int
    prompt: str
    """The prompt's text, as `row_key` hashed it."""
    messages: str
    """JSON: the conversation as a list of messages, or {"text": ...}."""
    reference: str | None
    format: str


class _Plan(Strict):
    """What a plan says about itself."""

    request: dict[str, Any]
    rows_per_part: int = Field(ge=1, le=MAX_ROWS_PER_PART)
    complete_jobs: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]


class Job:
    """A job on disk; safe to open in any number of processes."""

    def __init__(self, directory: Path, plan: Path | None = None) -> None:
        """Open `jobs/JOB`, or a `plan` that will lie there.

        Raises:
            DamagedError: its plan contradicts the format.
        """
        self.id = directory.name
        self.path = directory / "plan.arrow" if plan is None else plan
        if not JOB_PATTERN.fullmatch(self.id):
            raise DamagedError(f"{directory} is not the directory of a job")
        try:
            with open_regular(self.path), pa.memory_map(arrow_name(self.path)) as source:
                layout = ArrowLayout(memoryview(source.read_buffer()))
            self._layout, self._num_bytes = layout, self.path.stat().st_size
            metadata = self._reader.schema.metadata or {}
            if not self._reader.schema.equals(PLAN):
                raise DamagedError(
                    f"{self.path} has not the columns {', '.join(PLAN.names)}; it is no plan or was altered"
                )
            if metadata[_CHECKSUM_KEY] != xxhash.xxh3_128_hexdigest(metadata[_METADATA_KEY]).encode():
                raise DamagedError(f"{self.path} was altered after it was planned; restore it from a copy")
            document = parse_json(metadata[_METADATA_KEY], self.path)
            checked_model(_Plan, document, self.path)
            self.request: dict[str, Any] = document["request"]
            if job_id(self.request) != self.id:
                raise DamagedError(
                    f"{self.path} answers a request that its directory is not named by; restore it from a copy"
                )
            self.rows_per_part: int = document["rows_per_part"]
            self.complete_jobs: frozenset[str] = frozenset(document["complete_jobs"])
        except DamagedError as error:
            raise (
                error if str(error).startswith(str(self.path)) else DamagedError(f"{self.path} is not a plan: {error}")
            ) from None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise DamagedError(f"{self.path} is not a plan ({first_line(error)})") from None

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(
            pa.OSFile(arrow_name(self.path))
        )  # not mapped: pages of a long plan would stay resident, unit after unit

    @property
    def id8(self) -> str:
        """First 8 digits of the id, as parts carry them."""
        return self.id[:8]

    @property
    def num_units(self) -> int:
        """How many parts the job makes."""
        return len(self._layout.blocks)

    @property
    def num_rows(self) -> int:
        """How many rows the plan holds."""
        return sum(self._batch(i)[0].num_rows for i in range(self.num_units))

    def part_stem(self, unit: int) -> str:
        """Return the name, without ending, of the part that a unit makes."""
        return f"part-{self.id8}-{unit:06d}"

    def rows_of(self, unit: int) -> int:
        """Return how many rows a unit has; all but the last have `rows_per_part`."""
        return self.rows_per_part if unit < self.num_units - 1 else int(self._batch(unit)[0].num_rows)

    def unit(self, unit: int) -> list[PlanRow]:
        """Return the rows of a unit after comparing them with their checksum.

        Raises:
            DamagedError: the unit cannot be read or is not what was planned.
        """
        batch, metadata = self._batch(unit)
        columns = [batch.column(field.name).to_pylist() for field in fields(PlanRow)]
        rows = [PlanRow(*values) for values in zip(*columns, strict=True)]
        if metadata.get(_CHECKSUM_KEY) != _checksum(rows):
            raise DamagedError(
                f"{self.path} unit {unit} was altered after it was planned; restore the plan from a copy"
            )
        return rows

    def is_complete(self, committed: frozenset[str]) -> bool:
        """Tell whether the stems of committed sequences parts hold every unit."""
        return all(self.part_stem(unit) in committed for unit in range(self.num_units))

    def _batch(self, unit: int) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
        check_whole(self.path, self._num_bytes)
        try:
            rows = self._layout.check_batch(unit, PLAN)
            if not rows <= self.rows_per_part:
                raise DamagedError(f"it has {rows} rows where a unit has at most {self.rows_per_part}")
            found = self._reader.get_batch_with_custom_metadata(unit)
            found.batch.validate(full=True)
        except DamagedError as error:
            raise DamagedError(f"{self.path} unit {unit} is damaged: {error}") from None
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DamagedError(f"{self.path} unit {unit} cannot be read ({first_line(error)})") from None
        return found.batch, dict(found.custom_metadata or {})


def job_id(request: Mapping[str, Any]) -> str:
    """Return the 32 hexadecimal digits that name a request."""
    return xxhash.xxh3_128_hexdigest(canonical_json(dict(request)))


def list_jobs(cache_dir: Path) -> list[Job]:
    """Return the jobs of a cache by id.

    Raises:
        DamagedError: a plan contradicts the format.
    """
    root = cache_dir / "jobs"
    names = [name for name in list_folder(root) if JOB_PATTERN.fullmatch(name)]
    return [Job(root / name) for name in names if "plan.arrow" in list_folder(root / name)]


def create_job(cache_dir: Path, request: Mapping[str, Any], rows: Iterable[PlanRow], rows_per_part: int) -> Job:
    """Return the job of a request, planning it if this is the first time.

    Args:
        cache_dir: the cache, which exists.
        request: everything that decides the work list; equal requests are one job.
        rows: the work list; consumed only where the plan does not exist. Rows that are committed already are left out.
        rows_per_part: rows of a unit.

    Raises:
        CacheError: the plan cannot be written.
        ValueError: `rows_per_part` is out of range.
    """
    if not 0 < rows_per_part <= MAX_ROWS_PER_PART:
        raise ValueError(f"rows_per_part must lie within [1, {MAX_ROWS_PER_PART}], got {rows_per_part}")
    directory = cache_dir / "jobs" / job_id(request)
    path = directory / "plan.arrow"
    if not path.exists():
        jobs = list_jobs(cache_dir)
        if any(
            job.id8 == directory.name[:8] and job.id != directory.name for job in jobs
        ):  # our own: another planner was first
            raise CacheError(
                f"{cache_dir} holds another job whose id starts with {directory.name[:8]}; change the seed"
            )
        records = list_records(cache_dir / "sequences")
        stems = frozenset(record.stem for record in records)
        document = {
            "request": dict(request),
            "rows_per_part": rows_per_part,
            "complete_jobs": [job.id for job in jobs if job.is_complete(stems)],
        }
        committed = KeySet(committed_keys(cache_dir / "sequences", records))
        text = canonical_json(document)
        schema = PLAN.with_metadata({_METADATA_KEY: text, _CHECKSUM_KEY: xxhash.xxh3_128_hexdigest(text).encode()})

        def fill(file: BinaryIO) -> None:
            with pa.ipc.new_file(file, schema) as writer:
                for unit in _units(rows, rows_per_part, committed):
                    writer.write_batch(_to_batch(unit, schema), custom_metadata={_CHECKSUM_KEY: _checksum(unit)})

        make_dir(directory)
        fill_exclusive(path, fill, "plan", 0, step="link")
    return Job(directory)


def committed_keys(directory: Path, records: Iterable[PartRecord]) -> NDArray[np.uint8]:
    """Return [R, 16] row_keys of committed sequences parts, in the order of the records."""
    keys = [key_column(open_part(directory, record, verify=False), "row_key") for record in records]
    return np.concatenate(keys) if keys else np.zeros((0, KEY_BYTES), np.uint8)


def key_column(table: pa.Table, name: str) -> NDArray[np.uint8]:
    """Return [R, 16] bytes of a key column, a view into the mapped file."""
    if table.num_rows == 0:
        return np.zeros((0, KEY_BYTES), np.uint8)
    chunk = table.column(name).chunk(0)
    try:
        octets = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        start = chunk.offset * KEY_BYTES
        return octets[start : start + len(chunk) * KEY_BYTES].reshape(len(chunk), KEY_BYTES)
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"a column {name} of {len(chunk)} keys has an impossible buffer ({first_line(error)})"
        ) from None


def _units(rows: Iterable[PlanRow], rows_per_part: int, committed: KeySet) -> Iterator[list[PlanRow]]:
    """Cut rows that are not committed into units; the last one may be shorter."""
    left = _uncommitted(rows, committed)
    while unit := list(islice(left, rows_per_part)):
        yield unit


def _uncommitted(rows: Iterable[PlanRow], committed: KeySet) -> Iterator[PlanRow]:
    """Leave out committed rows, asking for a thousand at a time."""
    pending = iter(rows)
    while asked := list(islice(pending, 1000)):
        yield from compress(asked, ~committed.contains(stack_keys([row.row_key for row in asked])))


def _checksum(rows: list[PlanRow]) -> bytes:
    values = [
        [v.hex() if isinstance(v, bytes) else v for v in (getattr(row, f.name) for f in fields(row))] for row in rows
    ]
    return xxhash.xxh3_128_hexdigest(canonical_json(values)).encode()


def _to_batch(unit: list[PlanRow], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array([getattr(row, column.name) for row in unit], type=column.type) for column in PLAN]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)

"""Parts: committed once, readable or refused, whatever happened to their bytes."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.cache import Cache, Row
from shared.cache.reading.verify import verify_cache
from shared.errors import CacheError, DamagedError
from shared.parts.jobs import list_jobs
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.part_stats import sequences_stats
from shared.parts.parts import commit_part, open_part
from shared.parts.records import list_records
from shared.parts.sequences import rows_to_table
from shared.schema import SEQUENCES
from tests.shared.dense_targets import equal_targets
from tests.shared.small_cache import TOP, build, plan_rows, sequence, tree

STEM = "part-0123abcd-000000"


def commit(directory: Path, numbers: range, stem: str = STEM) -> object:
    directory.mkdir(exist_ok=True)
    rows = [sequence(row) for row in plan_rows(numbers.start, numbers.stop)]
    return commit_part(directory, stem, rows_to_table(rows), sequences_stats(rows), {}, [])


def test_two_writers_of_one_unit_leave_one_part_with_its_own_record(tmp_path: Path) -> None:
    for attempt in range(10):
        directory = tmp_path / str(attempt) / "sequences"
        directory.parent.mkdir()
        with ThreadPoolExecutor(6) as pool:  # different answers, as a teacher that samples would give
            returned = list(pool.map(commit, [directory] * 6, [range(i, i + 3 + i) for i in range(6)]))
        records = list_records(directory)
        assert returned == records * 6
        assert open_part(directory, records[0], verify=True).num_rows == records[0].rows
        assert len(list(directory.iterdir())) == 2


def test_part_of_a_killed_writer_is_adopted_not_overwritten(tmp_path: Path) -> None:
    directory = tmp_path / "sequences"
    first = commit(directory, range(3))
    (directory / f"{STEM}.json").unlink()
    assert list_records(directory) == []
    assert commit(directory, range(5, 9)) == first


def test_cache_under_a_name_that_is_no_utf8_is_as_whole_as_under_another(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    build(place, 0, 8)
    build(tmp_path / "cafe", 0, 8)
    assert tree(place) == tree(tmp_path / "cafe")
    assert list(verify_cache(place)) == []
    rows = [Cache.open(path, verify=True) for path in (place, tmp_path / "cafe")]
    assert [row.key for row in rows[0]] == [row.key for row in rows[1]]
    assert [unit for job in list_jobs(place) for unit in job.unit(0)]


def test_empty_part_reads_back(tmp_path: Path) -> None:
    record = commit(tmp_path / "sequences", range(0))
    part = MappedSequences(tmp_path / "sequences", record, verify=True)  # type: ignore[arg-type]
    assert len(part) == 0
    assert part.num_tokens().shape == (0,)
    assert part.sources()[1] == []


@pytest.mark.parametrize(
    "stem", ["../part-0123abcd-000000", "part-0123abcd-0", "part-0123ABCD-000000", "x", "part-0123abcd-000000/"]
)
def test_names_that_are_no_parts_are_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ValueError, match="not the name of a part"):
        commit(tmp_path / "sequences", range(1), stem)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "cache"
    build(path, last=6)
    return path


def same_row(a: Row, b: Row) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    texts = ("key", "row_key", "group_key", "source", "prompt", "response", "reference", "finish_reason")
    arrays = np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.spans, b.spans)
    return (
        arrays and all(getattr(a, name) == getattr(b, name) for name in texts) and equal_targets(a.targets, b.targets)
    )


def reads_equal_or_refused(path: Path, truth: list[Row]) -> bool:
    """Read every row; True where all equal the truth, False where one was refused as damaged."""
    refused = False
    try:
        cache = Cache.open(path)
        assert len(cache) == len(truth)
        np.testing.assert_equal(len(cache.num_tokens), len(truth))
        assert len(cache.group_keys) == len(cache.sources) == len(truth)
    except DamagedError:
        refused = True
        return False
    for i, row in enumerate(truth):
        try:
            assert same_row(cache[i], row)
        except DamagedError as error:
            assert "\n" not in str(error)
            refused = True
    return not refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequences", f"targets/{TOP.name}-{TOP.hash8}"])
def test_flipped_bytes_are_refused_or_change_nothing(whole: Path, tmp_path: Path, kind: str) -> None:
    truth = list(Cache.open(whole))
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    part = sorted((path / kind).glob("*.arrow"))[0]
    good = part.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = []
    for at in rng.choice(len(good), 250, replace=False):
        damaged = bytearray(good)
        damaged[at] ^= int(rng.integers(1, 256))
        part.write_bytes(damaged)
        outcomes.append(reads_equal_or_refused(path, truth))
        assert any("checksum" in problem for problem in verify_cache(path)), f"verify missed byte {at}"
    assert not all(outcomes)
    assert any(outcomes) or kind == "sequences"


@pytest.mark.slow
def test_flipped_bytes_of_unverified_parts_never_raise_anything_else(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sequences"
    shutil.copytree(whole / "sequences", directory)
    record = list_records(directory)[0]
    part = directory / f"{record.stem}.arrow"
    good = part.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for at in rng.choice(len(good), 600, replace=False):
        damaged = bytearray(good)
        damaged[at] ^= int(rng.integers(1, 256))
        part.write_bytes(damaged)
        try:
            mapped = MappedSequences(directory, record, verify=False)
            mapped.num_tokens()
            mapped.sources()
            for i in range(len(mapped)):
                mapped.row(i)
        except DamagedError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", ["sequences", f"targets/{TOP.name}-{TOP.hash8}"])
def test_truncated_parts_are_refused(whole: Path, tmp_path: Path, kind: str) -> None:
    truth = list(Cache.open(whole))
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    part = sorted((path / kind).glob("*.arrow"))[0]
    good = part.read_bytes()
    for length in (0, 1, 8, len(good) // 3, len(good) // 2, len(good) - 8, len(good) - 1):
        part.write_bytes(good[:length])
        assert not reads_equal_or_refused(path, truth)
    part.unlink()
    assert not reads_equal_or_refused(path, truth)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"rows": 5},
        {"rows": "4"},
        {"stem": "part-0123abcd-000009"},
        {"xxh3": None},
        {"stats": []},
        {"set_aside": 3},
        {"rows": 10**12},
    ],
)
def test_altered_records_are_refused(whole: Path, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    record = sorted((path / "sequences").glob("*.json"))[0]
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(DamagedError):
        list(Cache.open(path))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1e999}', "[" * 100_000, "\x00" * 50])
def test_records_that_are_no_records_are_refused(whole: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    sorted((path / "sequences").glob("*.json"))[0].write_text(text)
    with pytest.raises(DamagedError):
        Cache.open(path)


def test_record_of_a_later_format_names_the_remedy(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    record = sorted((path / "sequences").glob("*.json"))[0]
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 2}))
    with pytest.raises(
        CacheError, match="has format 2 and this version of Decant reads format 1; use the version that wrote it"
    ):
        Cache.open(path)


def test_part_that_claims_more_positions_than_its_sequence_is_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(whole, path)
    layer = path / "targets" / f"{TOP.name}-{TOP.hash8}"
    record = list_records(layer)[0]
    table = open_part(layer, record, verify=True)
    claims = pa.array([2**31 - 1] * table.num_rows, pa.int32())
    table = table.set_column(1, table.schema.field(1), claims)
    (layer / f"{record.stem}.arrow").unlink()
    (layer / f"{record.stem}.json").unlink()
    commit_part(layer, record.stem, table, record.stats, {}, [])
    with pytest.raises(DamagedError, match="2147483647 positions where the sequence supervises"):
        Cache.open(path)[0]


def test_compressed_part_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "sequences"
    record = commit(directory, range(4))
    table = open_part(directory, record, verify=False)  # type: ignore[arg-type]
    compressed = directory / f"{STEM}.arrow"
    data = table.combine_chunks()
    with pa.ipc.new_file(
        str(compressed) + "x", SEQUENCES, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(data)
    Path(str(compressed) + "x").replace(compressed)
    with pytest.raises(DamagedError, match="compressed inside"):
        open_part(directory, record, verify=False)  # type: ignore[arg-type]


def test_targets_of_another_part_are_refused(whole: Path) -> None:
    layer = whole / "targets" / f"{TOP.name}-{TOP.hash8}"
    first, second = list_records(layer)[:2]
    targets = MappedBlobs(layer, first, verify=True)
    other = MappedSequences(whole / "sequences", list_records(whole / "sequences")[1], verify=True).row(0)
    assert second.stem != first.stem
    with pytest.raises(DamagedError, match=r"scores content .* where the sequence has"):
        targets.blob(0, other)

"""Jobs: one plan per request, the same for every worker, and no row shown twice after two builds at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import DamagedError
from shared.parts.jobs import Job, PlanRow, create_job, job_id, list_jobs
from tests.shared.small_cache import SEQUENCES, TOKENIZER, TOP, build, plan_rows, score, write_unit


@pytest.fixture
def writer(tmp_path: Path) -> CacheWriter:
    return CacheWriter.create_or_open(tmp_path / "cache", SEQUENCES, TOKENIZER)


def all_rows(job: Job) -> list[PlanRow]:
    return [row for unit in range(job.num_units) for row in job.unit(unit)]


def test_plan_holds_the_rows_in_units(writer: CacheWriter) -> None:
    job = create_job(writer.path, {"seed": 1}, plan_rows(0, 10), 4)
    assert [len(job.unit(unit)) for unit in range(job.num_units)] == [4, 4, 2]
    assert all_rows(job) == list(plan_rows(0, 10))
    assert job.num_rows == 10
    assert (job.rows_per_part, job.request, job.id) == (4, {"seed": 1}, job_id({"seed": 1}))
    assert job.part_stem(2) == f"part-{job.id[:8]}-000002"


def test_second_planner_takes_the_first_plan_without_asking_for_rows(writer: CacheWriter) -> None:
    def never() -> Iterator[PlanRow]:
        pytest.fail("rows were asked for")
        yield

    first = create_job(writer.path, {"a": 1, "b": [2]}, plan_rows(0, 5), 2)
    second = create_job(writer.path, {"b": [2], "a": 1}, never(), 2)
    assert all_rows(second) == all_rows(first)
    assert len(list_jobs(writer.path)) == 1


def test_planners_at_the_same_time_agree(writer: CacheWriter) -> None:
    with ThreadPoolExecutor(8) as pool:  # different rows: whoever is first decides for all
        jobs = list(pool.map(lambda i: create_job(writer.path, {"seed": 1}, plan_rows(i, i + 3), 2), range(8)))
    plans = [all_rows(job) for job in jobs]
    assert all(plan == plans[0] for plan in plans)
    assert [path.name for path in jobs[0].path.parent.iterdir()] == ["plan.arrow"]


def test_empty_plan_is_a_complete_job(writer: CacheWriter) -> None:
    job = create_job(writer.path, {"seed": 1}, [], 4)
    assert job.num_units == 0
    assert job.is_complete(frozenset())


def test_later_plan_leaves_out_committed_rows_and_remembers_complete_jobs(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    build(path, 0, 5)
    first = list_jobs(path)[0]
    job = create_job(path, {"more": True}, plan_rows(0, 12), 4)
    assert all_rows(job) == list(plan_rows(5, 12))
    assert job.complete_jobs == {first.id}


def overlapping(path: Path) -> CacheWriter:
    """Two builds that both planned rows 3 to 5 before either had committed anything."""
    writer = CacheWriter.create_or_open(path, SEQUENCES, TOKENIZER)
    jobs = [create_job(path, {"first": 0}, plan_rows(0, 6), 2), create_job(path, {"second": 0}, plan_rows(3, 10), 2)]
    for job in jobs:
        assert job.complete_jobs == frozenset()
        for unit in range(job.num_units):
            write_unit(writer, job, unit)
    score(LayerWriter.create_or_open(writer, None, TOP, {}))
    return writer


def test_rows_of_two_builds_at_the_same_time_are_shown_once(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    writer = overlapping(path)
    kept = [row.row_key for row in plan_rows(0, 10) if row.line % 7]
    cache = Cache.open(path)
    assert sum(record.rows for record in writer.sequence_records()) == len(kept) + 3
    assert sorted(row.row_key for row in cache) == sorted(kept)
    assert len(cache) == len(cache.num_tokens) == len(cache.group_keys) == len(cache.sources) == len(kept)
    for i, row in enumerate(cache):
        assert cache.num_tokens[i] == len(row.token_ids)
        assert cache.group_keys[i].tobytes() == row.group_key
        assert cache.source_names[cache.sources[i]] == row.source
    figures = cache.stats()
    assert (figures["rows"], figures["hidden_rows"]) == (len(kept), 3)
    assert figures["positions"] == sum(row.num_positions for row in cache)
    assert list(verify_cache(path)) == []


def test_the_row_of_the_lower_job_is_the_one_shown(tmp_path: Path) -> None:
    overlapping(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    lower = min(list_jobs(tmp_path / "cache"), key=lambda job: job.id)
    planned = {row.row_key for row in all_rows(lower) if row.line % 7}
    shown = {row.row_key for i, row in enumerate(cache) if lower.id8 in cache.where(i)}
    assert shown == planned


def test_one_build_after_another_reads_no_row_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "cache", 0, 5)
    build(tmp_path / "cache", 0, 12)
    monkeypatch.setattr("shared.parts.repeated_rows.key_column", lambda *_: pytest.fail("row_keys were read"))
    assert len(Cache.open(tmp_path / "cache")) == 11


def test_flipped_bytes_of_a_plan_are_refused_or_change_nothing(writer: CacheWriter) -> None:
    job = create_job(writer.path, {"seed": 1}, plan_rows(0, 6), 4)
    truth, request, path = all_rows(job), job.request, job.path
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.choice(len(good), 300, replace=False):
        damaged = bytearray(good)
        damaged[at] ^= int(rng.integers(1, 256))
        path.unlink()  # not written over: the job above maps the old file
        path.write_bytes(damaged)
        try:
            read = Job(path.parent)
            assert all_rows(read) == truth
            assert read.request == request
        except DamagedError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("keep", [0, 20, 500])
def test_truncated_plan_is_refused(writer: CacheWriter, keep: int) -> None:
    job = create_job(writer.path, {"seed": 1}, plan_rows(0, 10), 4)
    os.truncate(job.path, keep)
    with pytest.raises(DamagedError, match="is not a plan"):
        Job(job.path.parent)


def test_failing_source_of_rows_leaves_no_plan(writer: CacheWriter) -> None:
    def failing() -> Iterator[PlanRow]:
        yield from plan_rows(0, 3)
        raise RuntimeError("prompts ended")

    with pytest.raises(RuntimeError):
        create_job(writer.path, {"seed": 1}, failing(), 2)
    assert list_jobs(writer.path) == []
    assert not list(writer.path.glob("jobs/*/*"))

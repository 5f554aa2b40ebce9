"""A cache behind a URL reads as the directory does: same rows, bounded, and nothing that was altered."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.sync import mirror
from shared.cache.sync.listing import read_listing
from shared.errors import CacheError, DamagedError
from shared.places import named, origin_of, place_of, store_dir
from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe
from shared.remote import part_store, transfer
from tests.remote.loopback import flipped
from tests.shared.small_cache import tree
from tools.bench.loopback_s3 import KEYS
from tools.cache.cache_merge import merge_caches
from tools.cache.cache_subset import Choice, subset_cache

REPOSITORY = Path(__file__).parents[2]


def same_rows(one: Cache, other: Cache) -> None:
    assert (one.cache_id, len(one)) == (other.cache_id, len(other))
    for name in ("num_tokens", "group_keys", "row_keys", "sources"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for i in range(len(one)):
        a, b = one[i], other[i]
        assert (a.key, a.prompt, a.response, a.reference) == (b.key, b.prompt, b.response, b.reference)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        for name in ("counts", "ids", "logprobs", "label_logprobs", "tail_logmass"):
            np.testing.assert_array_equal(getattr(a.targets, name), getattr(b.targets, name))


@pytest.mark.slow
def test_a_cache_behind_a_url_reads_as_the_directory_does_although_every_seventh_answer_breaks_off(web, local):
    web.break_every = 7
    remote = Cache.open(web.url)
    same_rows(remote, Cache.open(local))
    assert web.broken > 3
    assert list(verify_cache(remote.path)) == []
    same_rows(pickle.loads(pickle.dumps(remote)), Cache.open(local))


def test_records_come_first_and_each_part_once(web):
    cache = Cache.open(web.url)
    assert not [name for name in web.requests if name.endswith("-000003.arrow")]
    for _ in range(3):
        cache[len(cache) // 2], cache.num_tokens
    fetched = [name for name in web.requests if name.startswith("sequences/") and name.endswith(".arrow")]
    assert len(fetched) == len(set(fetched)) == 10


def test_the_store_stays_within_its_bound_whatever_is_read(web, local, monkeypatch):
    largest = max(file.stat().st_size for file in local.rglob("part-*.arrow"))
    monkeypatch.setenv("DECANT_STORE_GB", str(3.5 * largest / 1e9))
    monkeypatch.setattr("shared.parts.open_parts.MOST_FETCHED_PARTS", 1)
    remote, here = Cache.open(web.url), Cache.open(local)
    for i in np.random.default_rng(0).integers(0, len(here), 60).tolist():
        np.testing.assert_array_equal(remote[i].targets.logprobs, here[i].targets.logprobs)
        kept = sum(file.stat().st_size for file in (store_dir() / "parts").iterdir())
        assert kept <= 3.5 * largest


def test_a_part_that_does_not_fit_the_bound_is_refused(web, monkeypatch):
    monkeypatch.setenv("DECANT_STORE_GB", "0.000001")
    with pytest.raises(CacheError, match="DECANT_STORE_GB keeps 1,000; raise it"):
        Cache.open(web.url)[0]


@pytest.mark.parametrize(
    "ending",
    [
        "-000004.arrow",
        "/cache.json",
        *(
            pytest.param(ending, marks=pytest.mark.slow)
            for ending in ("-000004.json", "layer.json", "files.json", "tokenizer.json", "plan.arrow")
        ),
    ],
)
def test_a_flipped_byte_on_the_server_is_refused_by_the_name_of_its_file(web, local, ending, new_store):
    for file in [file for file in web.directory.rglob("*") if str(file).endswith(ending)]:
        name, whole = str(file.relative_to(web.directory)), file.read_bytes()
        new_store(name)
        file.write_bytes(flipped(file))
        with pytest.raises(DamagedError, match=f"{web.url}/{name}"):
            for problem in verify_cache(Cache.open(web.url).path):
                raise DamagedError(problem)
        file.write_bytes(whole)
        mirror._bring_once.cache_clear()
        same_rows(Cache.open(web.url), Cache.open(local))  # nothing of it was kept


def test_a_part_that_the_disk_forgot_is_fetched_again(web, local):
    Cache.open(web.url)[0]
    part = max((store_dir() / "parts").iterdir(), key=lambda file: file.stat().st_size)
    data = part.read_bytes()
    part.write_bytes(data[:-9] + b"?" + data[-8:])
    part_store._checked.clear()
    same_rows(Cache.open(web.url), Cache.open(local))
    assert part.read_bytes() == data
    for columns in (Cache.open(web.url).path / "columns").iterdir():
        columns.write_bytes(b"")
    same_rows(Cache.open(web.url), Cache.open(local))


@pytest.mark.parametrize("content", [{}, {"files": []}, {"files": {"cache.json": {"bytes": 1}}}])
def test_a_list_of_files_in_another_shape_is_refused(content):
    with pytest.raises(DamagedError, match=r"files\.json says files"):
        read_listing(json.dumps({"format": 1, **content}).encode(), "https://host/files.json")


def test_what_is_not_there_is_said(web):
    with pytest.raises(CacheError, match=rf"{web.url}/nothing has no files\.json"):
        Cache.open(f"{web.url}/nothing")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:hunter2@host/demo", "https://host/demo comes with a password"),
        ("https://host/demo?token=hunter2", "https://host/demo comes with a password, a query"),
        ("ftp://host/demo", "ftp:// is not among s3://"),
        ("s3:///demo", "names no place"),
        ("s3://bucket/" + "x" * 300, "too long"),
    ],
)
def test_a_url_that_cannot_be_kept_is_refused_without_its_secret(url, said):
    with pytest.raises(ValueError, match=said) as caught:
        place_of(url)
    assert "hunter2" not in str(caught.value)


def test_a_place_and_its_url_follow_from_each_other_and_a_recipe_writes_the_url(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path))
    urls = ["s3://bucket/a%20b/c", "hf://datasets/org/name@main", "https://host:80/x_y/z~"]
    for url in urls:
        assert origin_of(place_of(url)) == named(place_of(url)) == url
        assert origin_of(place_of(url) / "sequences") == f"{url}/sequences"
    recipe = Recipe(name="x", output_dir="runs/x", cache=[*urls, "runs/cache"])
    assert all(f"- {url}\n" in dump_recipe(recipe) for url in [*urls, "runs/cache"])


def test_commands_take_a_url_and_write_no_key_anywhere(web, tmp_path):
    def decant(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", *words],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )

    found = decant("cache", "ls", web.url, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["path"] == web.url
    refused = decant("cache", "gc", web.url)
    assert refused.returncode == 2
    assert "directory" in refused.stderr
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [data for data in written if KEYS["AWS_SECRET_ACCESS_KEY"].encode() in data]


@pytest.mark.parametrize(
    ("num_parts", "num_readers", "seconds", "least"),
    [(12, 12, 0.02, 2), (400, 8, 0.0, 3)],
    ids=["that wait for each other", "that get their names while others look"],
)
def test_parts_that_come_at_the_same_time_stay_within_the_bound(
    new_store, monkeypatch, num_parts, num_readers, seconds, least
):
    parts = [number.to_bytes(4, "big") * 250 for number in range(num_parts)]
    monkeypatch.setenv("DECANT_STORE_GB", str(3500 / 1e9))
    most, folder = [0], part_store.parts_dir()

    def fetch(data: bytes) -> Path:
        def read(start: int, end: int) -> bytes:
            time.sleep(seconds)
            seen: list[str] = []
            while seen != (now := sorted(file.name.split(".")[0] for file in folder.iterdir())):
                seen = now  # a file that is renamed may be missing in one list
            most.append(len(set(seen)))
            return data[start:end]

        return part_store.fetch_part("part", len(data), xxhash.xxh3_128_hexdigest(data), read)

    with ThreadPoolExecutor(num_readers) as pool:
        fetched = list(pool.map(fetch, parts))
    assert len({path.name for path in fetched}) == num_parts
    assert least <= max(most) <= 3


@pytest.mark.parametrize(
    ("error", "is_said"), [(ConnectionResetError("closing transport"), False), (ValueError("odd"), True)]
)
def test_a_connection_that_broke_under_a_forgotten_task_is_not_printed(error, is_said, caplog):
    files = transfer._filesystem("https", os.getpid())

    async def breaks() -> None:
        raise error

    async def forgets() -> None:
        task = asyncio.ensure_future(breaks())
        await asyncio.wait([task])
        del task
        gc.collect()

    asyncio.run_coroutine_threadsafe(forgets(), files.loop).result()
    gc.collect()
    assert ("never retrieved" in caplog.text) == is_said


@pytest.mark.parametrize("copy", [False, True])
def test_parts_behind_a_url_are_taken_over_as_those_of_a_directory(web, local, tmp_path, monkeypatch, copy):
    most = max(file.stat().st_size for file in local.rglob("part-*.arrow"))
    monkeypatch.setenv("DECANT_STORE_GB", str(1.5 * most / 1e9))  # each part takes the place of the one before
    url, choice = place_of(web.url), Choice(query='not "prompt 3" in prompt')
    mirror.bring_if_remote(url)
    for made, path in {"far": url, "near": local}.items():
        subset = subset_cache(path, tmp_path / f"{made}-subset", choice, copy=copy)
        assert (subset["copied"] if copy else subset["linked"]) > 0 < subset["rewritten"]
        merge_caches(tmp_path / f"{made}-merge", [path, tmp_path / f"{made}-subset"], copy=copy)
    for name in ("subset", "merge"):
        assert tree(tmp_path / f"far-{name}") == tree(tmp_path / f"near-{name}")


def test_a_place_whose_first_file_comes_while_it_is_listed_holds_none_yet():
    """s3fs finds nothing below the path, asks what the path is, and is told of a directory by then."""

    class Meanwhile:
        def invalidate_cache(self) -> None:
            pass

        def find(self, path: str, *, detail: bool) -> dict:
            assert detail
            return {path: {"name": path, "type": "directory", "size": 0, "StorageClass": "DIRECTORY"}}

    assert transfer._listing(Meanwhile(), "trials/5") == {}

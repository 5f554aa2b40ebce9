"""Pushed and pulled caches are the same files; what is there is not sent again, what differs is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

import shared.remote.hub
from shared.cache.cache import Cache
from shared.cache.layout import refuse_within_cache
from shared.cache.reading.verify import verify_cache
from shared.cache.sync.mirror import _bring_once, bring_if_remote
from shared.cache.sync.pull import pull_cache
from shared.cache.sync.push import push_cache, pushed_as_committed
from shared.errors import CacheError, DamagedError, UsageError
from shared.places import place_of
from shared.remote.hub import push_model
from shared.remote.transfer import Remote
from tests.remote.loopback import WebServer, flipped, needs_s3_server
from tests.remote.test_reading import same_rows
from tests.shared.small_cache import build, tree
from tests.system.program import ROOT
from tools.bench.loopback_s3 import s3_server, serving
from tools.cache.cache_commands import listing
from tools.cache.dataset_card import dataset_card
from tools.cli import main

URL = "hf://datasets/org/demo"


@pytest.mark.slow
def test_a_cache_goes_to_the_hub_and_comes_back_and_streams_from_there(hub, local, tmp_path):
    card = dataset_card(listing(local), URL)
    first = push_cache(local, Remote(URL), card.encode())
    files = hub.repositories["datasets/org/demo"]
    assert {name: data for name, data in files.items() if name not in ("README.md", "files.json")} == tree(local)
    assert hub.private["datasets/org/demo"]
    assert (first.files, first.already_there) == (len(tree(local)), 0)
    assert hub.commits[-2] == ["cache.json"]
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["license"] == "cc0-1.0"
    again = push_cache(local, Remote(URL))
    assert again.files == 0
    pull_cache(Remote(URL), tmp_path / "back")
    assert tree(tmp_path / "back") == tree(local)
    same_rows(Cache.open(URL), Cache.open(local))
    assert "Bearer hf_secret" in hub.tokens
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]


@pytest.mark.parametrize("below", ["/targets/mine", "/mine"])
def test_nothing_is_pushed_to_a_place_below_the_url_of_another_cache(hub, local, tmp_path, below):
    push_cache(local, Remote(URL))
    before = dict(hub.repositories["datasets/org/demo"])
    build(tmp_path / "other", 100, 8)
    with pytest.raises(UsageError, match=f"{URL}{below} lies in the cache {URL}, where nothing else belongs"):
        push_cache(tmp_path / "other", Remote(f"{URL}{below}"))
    with pytest.raises(UsageError, match=f"{URL}{below} lies in the cache {URL}, where nothing else belongs"):
        refuse_within_cache(place_of(f"{URL}{below}"))  # what a build asks before it starts
    assert hub.repositories["datasets/org/demo"] == before
    push_cache(tmp_path / "other", Remote("hf://datasets/org/all/mine"))
    push_cache(local, Remote("hf://datasets/org/all/demo"))


@pytest.mark.slow
def test_a_cache_goes_to_s3_and_streams_from_there(new_store, local, monkeypatch):
    needs_s3_server()
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        Remote("s3://bucket")._files().mkdir("bucket")
        assert push_cache(local, Remote("s3://bucket/demo")).files == len(tree(local))
        assert push_cache(local, Remote("s3://bucket/demo")).files == 0
        with pytest.raises(UsageError, match="s3://bucket/demo/a/b lies in the cache s3://bucket/demo"):
            push_cache(local, Remote("s3://bucket/demo/a/b"))
        same_rows(Cache.open("s3://bucket/demo"), Cache.open(local))


@pytest.mark.parametrize("place", ["pushed.before_rename@3", "pushed.after_write@20", "pushed.after_rename@9", None])
def test_a_cache_goes_to_a_directory_that_a_web_server_serves(new_store, local, tmp_path, place):
    served = tmp_path / "served"
    words = [sys.executable, "-P", "-m", "tools.cli", "cache", "push", str(local), str(served)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if place is not None:
        killed = subprocess.run(words, env={**environment, "DECANT_FAILPOINT": place}, capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert not (served / "files.json").exists()
    subprocess.run(words, env=environment, capture_output=True, check=True)
    whole = {name: data for name, data in tree(served).items() if ".tmp-" not in name}
    assert {name: data for name, data in whole.items() if name not in ("README.md", "files.json")} == tree(local)
    with serving(WebServer(served)) as server:
        same_rows(Cache.open(server.url), Cache.open(local))
    assert push_cache(local, Remote(str(served))).files == 0


def test_a_cache_that_is_served_from_its_own_directory_stays_as_it_is(new_store, local, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(local, own)
    assert push_cache(own, Remote(str(own)), b"card").files == 0
    assert list(verify_cache(own)) == []
    with serving(WebServer(own)) as server:
        same_rows(Cache.open(server.url), Cache.open(local))
    assert {name: data for name, data in tree(own).items() if name not in ("README.md", "files.json")} == tree(local)


def test_a_place_that_holds_something_else_gets_no_cache(hub, local, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    hub.repositories["datasets/org/demo"] = {"train.parquet": b"rows", "README.md": b"mine"}
    for url, file in ((str(tmp_path / "model"), "config.json"), (URL, "train.parquet")):
        with pytest.raises(CacheError, match=f"{url} holds '{file}' and is no cache"):
            push_cache(local, Remote(url), b"card")
    assert tree(tmp_path / "model") == {"config.json": b"{}"}
    assert hub.repositories["datasets/org/demo"]["README.md"] == b"mine"


def test_a_cache_of_other_rows_joins_none_by_being_pushed_or_pulled(new_store, web, local, tmp_path):
    build(tmp_path / "other", 40, 48)  # the same identity, so the same cache.json
    place = tmp_path / "place"
    push_cache(local, Remote(str(place)))
    before = tree(place)
    with pytest.raises(CacheError, match=r"holds sequences/part-\w+-000000.arrow and no part of this cache: another"):
        push_cache(tmp_path / "other", Remote(str(place)))
    assert tree(place) == before
    for killed in (False, True):
        if killed:
            shutil.rmtree(tmp_path / "other" / "sequences")
            (tmp_path / "other" / "cache.json").unlink()
        before = tree(tmp_path / "other")
        with pytest.raises(CacheError, match=f"and no part of {web.url}: another cache; name another directory"):
            pull_cache(Remote(web.url), tmp_path / "other")
        assert tree(tmp_path / "other") == before
    build(tmp_path / "grown", 0, 40)
    build(tmp_path / "grown", 40, 48)
    assert pull_cache(Remote(web.url), tmp_path / "grown") == 0
    assert push_cache(tmp_path / "grown", Remote(str(place))).files > 0


def test_a_pull_puts_nothing_beside_files_of_something_else(web, local, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "main.py").write_text("print()")
    with pytest.raises(CacheError, match=r"project holds 'main\.py' and is no cache; name another directory"):
        pull_cache(Remote(web.url), tmp_path / "project")
    assert tree(tmp_path / "project") == {"main.py": b"print()"}


@pytest.mark.slow
def test_a_grown_cache_sends_what_is_new_and_another_cache_is_refused(hub, local, tmp_path):
    build(tmp_path / "grows", 0, 8)
    push_cache(tmp_path / "grows", Remote(URL))
    build(tmp_path / "grows", 8, 12)
    assert push_cache(tmp_path / "grows", Remote(URL)).files == 2 + 2 + 1
    same_rows(Cache.open(URL), Cache.open(tmp_path / "grows"))
    build(tmp_path / "grows", 12, 16)
    push_cache(tmp_path / "grows", Remote(URL))
    _bring_once.cache_clear()
    same_rows(Cache.open(URL), Cache.open(tmp_path / "grows"))
    record = next((tmp_path / "grows" / "sequences").glob("*.json"))
    other = record.read_bytes().replace(b'"decant": "test"', b'"decant": "best"')
    hub.repositories["datasets/org/demo"][f"sequences/{record.name}"] = other
    with pytest.raises(CacheError, match=f"{URL}/sequences/{record.name} is another one than this cache has"):
        push_cache(tmp_path / "grows", Remote(URL))


def test_a_damaged_part_is_neither_pushed_nor_pulled(hub, web, local, tmp_path):
    build(tmp_path / "bad", 0, 8)
    part = sorted((tmp_path / "bad" / "sequences").glob("*.arrow"))[0]
    part.write_bytes(flipped(part))
    with pytest.raises(DamagedError, match=part.name):
        push_cache(tmp_path / "bad", Remote(URL))
    assert f"sequences/{part.name}" not in hub.repositories.get("datasets/org/demo", {})
    served = sorted(web.directory.rglob("part-*.arrow"))[3]
    served.write_bytes(flipped(served))
    with pytest.raises(DamagedError, match=f"{web.url}/{served.relative_to(web.directory)}"):
        pull_cache(Remote(web.url), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / served.relative_to(web.directory)).exists()
    served.write_bytes((local / served.relative_to(web.directory)).read_bytes())
    pull_cache(Remote(web.url), tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(local)
    with pytest.raises(CacheError, match="can be read only"):
        push_cache(local, Remote(web.url))


@pytest.mark.parametrize("name", ["sequences/part-*.arrow", "targets/*/part-*.arrow", "jobs/*/plan.arrow"])
def test_a_file_that_a_server_lists_and_does_not_have_is_named_as_missing_there(web, tmp_path, name):
    """Not as a file of this machine that could not be written."""
    gone = next(web.directory.glob(name))
    gone.unlink()
    said = f"^{web.url}/{gone.relative_to(web.directory)} is .*not there.* push the cache"
    with pytest.raises(CacheError, match=said):
        pull_cache(Remote(web.url), tmp_path / "pulled")
    with pytest.raises(CacheError, match=said):
        list(Cache.open(web.url))


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", pytest.param("jobs/{job}/plan.arrow", marks=pytest.mark.slow)]
)
def test_what_was_altered_on_its_way_from_a_place_without_a_list_is_refused_and_not_kept(hub, local, tmp_path, name):
    push_cache(local, Remote(URL))
    files = hub.repositories["datasets/org/demo"]
    name = name.format(job=next((local / "jobs").iterdir()).name)
    whole = files[name]
    files[name] = flipped(local / name, 0.2)
    with pytest.raises(DamagedError, match=f"{URL}/{name}"):
        bring_if_remote(place_of(URL))
    with pytest.raises(DamagedError, match=f"{URL}/{name}"):
        pull_cache(Remote(URL), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / name).exists()
    files[name] = whole
    pull_cache(Remote(URL), tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(local)
    same_rows(Cache.open(URL), Cache.open(local))
    assert tree(place_of(URL))[name] == whole


@pytest.mark.slow
def test_a_build_into_a_url_goes_on_elsewhere_with_what_was_committed(hub, new_store, local):
    with pytest.raises(KeyboardInterrupt), pushed_as_committed(place_of(URL), print):
        build(place_of(URL), 0, 20)
        raise KeyboardInterrupt
    new_store("another machine")
    bring_if_remote(place_of(URL))
    with pushed_as_committed(place_of(URL), print):
        build(place_of(URL), 0, 20)
        build(place_of(URL), 20, 40)
    _bring_once.cache_clear()
    new_store("a third machine")
    assert len(Cache.open(URL)) == len(Cache.open(local))
    assert list(verify_cache(place_of(URL))) == []


def test_a_student_is_pushed_with_its_card(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A student\n")
    (tmp_path / "config.json").write_text("{}")
    push_model(tmp_path, "org/student")
    assert hub.repositories["models/org/student"]["README.md"].startswith(b"---\nlicense: mit")


def test_a_student_that_no_hub_takes_is_said_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(shared.remote.hub, "_api", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(CacheError, match=r"org/student cannot be pushed \(\w+: .*check the network"):
        push_model(tmp_path, "org/student")


@pytest.mark.parametrize("how", [flipped, lambda file: file.read_bytes()[:-8], Path.read_bytes])
def test_a_part_that_a_killed_pull_left_without_a_record_is_compared_before_it_gets_one(web, local, tmp_path, how):
    pulled = tmp_path / "pulled"
    pull_cache(Remote(web.url), pulled)
    record = sorted(pulled.rglob("part-*.json"))[3]
    part = record.with_suffix(".arrow")
    (pulled / "cache.json").unlink()
    record.unlink()
    part.write_bytes(how(part))
    pull_cache(Remote(web.url), pulled)
    assert tree(pulled) == tree(local)
    assert list(verify_cache(pulled)) == []


def test_a_push_names_what_killed_ones_left_in_a_directory(new_store, local, tmp_path, capsys):
    served = tmp_path / "served"
    (served / "sequences").mkdir(parents=True)
    left = served / "sequences" / ".part-0123abcd-000000.arrow.tmp-99-abc"
    left.write_bytes(b"half")
    (served / ".cache.json.tmp-99-abc").write_bytes(b"")
    assert main(["cache", "push", str(local), str(served)]) == 0
    said = capsys.readouterr().out
    assert f"2 files of pushes that were killed, or go on, are there half; `decant cache gc {served}` removes" in said
    for file in (left, served / ".cache.json.tmp-99-abc"):
        os.utime(file, (1, 1))
    assert main(["cache", "gc", str(served)]) == 0
    assert push_cache(local, Remote(str(served))).unfinished == 0


@pytest.mark.slow
def test_a_push_names_the_pieces_of_large_files_that_killed_ones_left_in_s3(new_store, local, monkeypatch, capsys):
    needs_s3_server()
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        remote = Remote("s3://bucket/demo")
        files = remote._files()
        files.mkdir("bucket")
        for key in ("demo/sequences/part-0123abcd-000000.arrow", "demo-2/other"):
            files.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        assert main(["cache", "push", str(local), "s3://bucket/demo"]) == 0
        assert "1 files of pushes that were killed, or go on, are there half; abort those" in capsys.readouterr().out


@pytest.mark.parametrize(("how", "why"), [(None, "restore it from a copy"), (flipped, "was altered after it was wr")])
def test_a_tokenizer_that_is_not_as_it_was_committed_is_not_pushed(new_store, local, tmp_path, how, why):
    cache = shutil.copytree(local, tmp_path / "own")
    file = next(path for path in sorted((cache / "tokenizer").rglob("*")) if path.is_file())
    if how is None:
        file.unlink()
    else:
        file.write_bytes(how(file))
    with pytest.raises(DamagedError, match=rf"{file.name} .*{why}"):
        push_cache(cache, Remote(str(tmp_path / "served")))
    assert not (tmp_path / "served" / "cache.json").exists()

"""Merged caches hold every row of their inputs once, in one step or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError, DamagedError, IdentityError
from shared.parts.records import list_records
from shared.parts.repeated_rows import repeated_rows
from tests.shared.altered import edit
from tests.shared.dense_targets import equal_targets
from tests.shared.small_cache import (
    HYBRID,
    SEQUENCES,
    TOKENIZER,
    TOP,
    build,
    plan_rows,
    score,
    sequence,
    targets_of,
    tree,
)
from tools import cli
from tools.cache.cache_merge import merge_caches


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """A SIGKILL is no power cut: what was written stays, synchronised or not, and a slow disk would make this page take
    minutes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def inputs(no_fsync: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Rows 0-9, rows 3-15 and rows 20-23, in parts of 4: a and b share rows, and only a has a second layer."""
    root = tmp_path_factory.mktemp("inputs")
    build(root / "a", 0, 10, layers=(TOP, HYBRID))
    build(root / "b", 3, 16)
    build(root / "c", 20, 24)
    return root / "a", root / "b", root / "c"


def row_keys(*ranges: tuple[int, int]) -> list[bytes]:
    return [row.row_key for first, last in ranges for row in plan_rows(first, last) if row.line % 7]


def test_merge_holds_every_row_once_with_the_targets_of_its_first_cache(inputs, tmp_path: Path) -> None:
    before = [tree(path) for path in inputs]
    result = merge_caches(tmp_path / "out", inputs)
    cache = Cache.open(tmp_path / "out", verify=True)
    assert [row.row_key for row in cache] == row_keys((0, 10), (10, 16), (20, 24))
    codec = TOP.make_codec()
    for row in cache:
        wanted = codec.decode(codec.encode(targets_of(row, TOP)), row.num_positions)
        assert row.targets is not None
        assert equal_targets(row.targets, wanted)
    assert list(verify_cache(tmp_path / "out")) == []
    assert cache._masks == {}
    assert [entry["dropped"] for entry in result["inputs"]] == [0, 6, 0]
    assert (result["rows"], result["rewritten"], result["parts"]) == (len(cache), 1, 7)
    assert result["layers"] == [f"top6-{TOP.hash8}"]
    assert [(entry["layer"], entry["not_in"]) for entry in result["left_out"]] == [
        (f"top3-sample4-{HYBRID.hash8}", [str(inputs[1]), str(inputs[2])])
    ]
    assert cache.stats()["positions"] == sum(row.num_positions for row in cache)
    assert [tree(path) for path in inputs] == before


def test_parts_without_repeats_are_the_files_of_the_inputs_and_copies_are_not(inputs, tmp_path: Path) -> None:
    linked = merge_caches(tmp_path / "linked", [inputs[0], inputs[2]])
    copied = merge_caches(tmp_path / "copied", [inputs[0], inputs[2]], copy=True)
    assert (linked["linked"], linked["copied"], linked["rewritten"]) == (8, 0, 0)
    assert (copied["linked"], copied["copied"]) == (0, 8)
    assert tree(tmp_path / "linked") == tree(tmp_path / "copied")
    known = {file.stat().st_ino for path in inputs for file in path.rglob("part-*.arrow")}
    assert {file.stat().st_ino for file in (tmp_path / "linked").rglob("part-*.arrow")} < known
    assert not {file.stat().st_ino for file in (tmp_path / "copied").rglob("part-*.arrow")} & known


def test_first_listed_cache_wins_where_answers_differ(inputs, tmp_path: Path) -> None:
    other = CacheWriter.create_or_open(tmp_path / "other", SEQUENCES, TOKENIZER)
    rows = [dataclasses.replace(sequence(row), response="another answer") for row in plan_rows(0, 4)]
    other.write_sequences("part-00000001-000000", rows, {})
    for order, answer in (((inputs[0], other.path), "answer "), ((other.path, inputs[0]), "another answer")):
        merge_caches(tmp_path / answer, order)
        found = {row.row_key: row.response for row in Cache.open(tmp_path / answer)}
        assert all(found[row.row_key].startswith(answer) for row in rows)
        assert len(found) == len(set(row_keys((0, 10))))


def test_repeats_within_one_cache_are_resolved_as_its_reader_does(inputs, tmp_path: Path) -> None:
    writer = CacheWriter.create_or_open(Path(shutil.copytree(inputs[0], tmp_path / "twice")), SEQUENCES, TOKENIZER)
    [id8] = {record.id8 for record in list_records(sequences_dir(inputs[0]))}
    for stem in ("part-00000000-000000", "part-ffffffff-000000"):  # before and after the job that holds the same rows
        marked = [dataclasses.replace(sequence(row), response=stem) for row in plan_rows(2, 5)]
        writer.write_sequences(stem, marked, {})
    assert "00000000" < id8 < "ffffffff"
    for identity in (TOP, HYBRID):
        score(LayerWriter.create_or_open(writer, None, identity, {}))
    shown = Cache.open(tmp_path / "twice", TOP.name)
    assert len(shown) == 9
    merge_caches(tmp_path / "out", [tmp_path / "twice", inputs[2]])
    merged = Cache.open(tmp_path / "out", TOP.name)
    assert [(row.row_key, row.response) for row in merged][: len(shown)] == [
        (row.row_key, row.response) for row in shown
    ]


@pytest.mark.parametrize("most_keys", [1, 3, 100])
def test_repeated_rows_are_found_in_any_number_of_passes(inputs, most_keys: int) -> None:
    parts = [
        (sequences_dir(path), record) for path in (*inputs, inputs[0]) for record in list_records(sequences_dir(path))
    ]
    found = repeated_rows(parts, most_keys)
    keys = [key for r in ((0, 10), (3, 16), (20, 24), (0, 10)) for key in row_keys(r)]
    flat = np.concatenate([found.get(i, np.zeros(record.rows, bool)) for i, (_, record) in enumerate(parts)])
    assert flat.tolist() == [key in keys[:i] for i, key in enumerate(keys)]


def test_later_build_on_a_merged_cache_adds_only_what_is_new(inputs, tmp_path: Path) -> None:
    merge_caches(tmp_path / "out", inputs[:2])
    build(tmp_path / "out", 0, 20)
    cache = Cache.open(tmp_path / "out", verify=True)
    assert sorted(row.row_key for row in cache) == sorted(row_keys((0, 20)))
    assert cache._masks == {}
    assert sum(record.rows for record in list_records(sequences_dir(tmp_path / "out"))) == len(cache)


def test_layer_that_is_partly_scored_stays_so_and_is_named(inputs, tmp_path: Path, capsys) -> None:
    partial = Path(shutil.copytree(inputs[0], tmp_path / "partial"))
    sorted((partial / "targets" / f"top6-{TOP.hash8}").glob("part*.json"))[1].unlink()
    assert cli.main(["cache", "merge", str(tmp_path / "out"), str(partial), str(inputs[2])]) == 0
    assert "1 parts are not scored" in capsys.readouterr().out
    writer = CacheWriter.create_or_open(tmp_path / "out", SEQUENCES, TOKENIZER)
    score(LayerWriter.create_or_open(writer, None, TOP, {}))
    assert len(Cache.open(tmp_path / "out", verify=True)) == 9 + 3


def run_killed(out: Path, inputs: list[Path], place: str, *, copy: bool = False) -> int:
    """Merge in a child that is killed at a fail-point; return the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.environ["DECANT_FAILPOINT"] = place
        merge_caches(out, inputs, copy=copy)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


PLACES = [
    "plan.after_link",
    "sequences_record.before_write@2",
    "targets_record.before_write@3",
    "sequences.after_rename",
    "cache_json.before_rename",
    "cache_json.after_rename",
]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    merge_caches(tmp_path_factory.mktemp("whole") / "out", inputs)
    return tmp_path_factory.getbasetemp() / "whole0" / "out"


@pytest.mark.parametrize("place", PLACES)
def test_killed_merge_is_no_cache_and_is_continued(inputs, whole: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    assert run_killed(out, list(inputs), place) == signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CacheError, match="is not a cache"):
        Cache.open(out)
    merge_caches(out, inputs)
    left = [file for file in out.rglob("*") if ".tmp-" in file.name]
    assert len(left) <= 1
    for file in left:
        file.unlink()
    assert tree(out) == tree(whole)
    assert list(tmp_path.iterdir()) == [out]


def test_same_merge_again_does_nothing_and_another_is_refused(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = merge_caches(out, inputs)
    before = tree(out)
    again = merge_caches(out, inputs)
    assert again["existed"]
    assert (again["rows"], again["parts"]) == (first["rows"], first["parts"])
    with pytest.raises(CacheError, match="exists and is not the merge of these caches as they are now"):
        merge_caches(out, inputs[:2])
    assert tree(out) == before


def test_unfinished_merge_of_other_caches_is_left_alone_and_named(inputs, tmp_path: Path) -> None:
    assert run_killed(tmp_path / "out", list(inputs[:2]), "sequences_record.after_rename") == signal.SIGKILL
    [left] = tmp_path.iterdir()
    result = merge_caches(tmp_path / "out", inputs)
    assert result["unfinished"] == [str(left)]
    assert len(Cache.open(tmp_path / "out")) == result["rows"]


def altered(path: Path, target: Path, **changes: object) -> Path:
    """A cache with other sequences identity."""
    shutil.copytree(path, target)
    edit(target / "cache.json", lambda document: document["identity"].update(changes))
    return target


def test_caches_that_differ_are_refused_with_the_field_and_both_values(inputs, tmp_path: Path) -> None:
    other = altered(inputs[1], tmp_path / "other", vocab_size=51)
    with pytest.raises(IdentityError, match=rf"vocab_size is 50 in {inputs[0]} and 51 in {other}"):
        merge_caches(tmp_path / "out", [inputs[0], other])
    build(tmp_path / "k", 30, 32, layers=())
    writer = CacheWriter.create_or_open(tmp_path / "k", SEQUENCES, TOKENIZER)
    score(LayerWriter.create_or_open(writer, "top6", dataclasses.replace(TOP, k=5), {}))
    with pytest.raises(
        IdentityError, match=rf"k is 6 in {inputs[1]} and 5 in {tmp_path / 'k'}; score one of them again"
    ):
        merge_caches(tmp_path / "out", [inputs[1], tmp_path / "k"])
    with pytest.raises(CacheError, match=rf"layer top6-{TOP.hash8} is not in {tmp_path / 'k'}"):
        merge_caches(tmp_path / "out", [inputs[1], tmp_path / "k"], [f"top6-{TOP.hash8}"])
    assert not (tmp_path / "out").exists()
    assert merge_caches(tmp_path / "out", [inputs[1], tmp_path / "k"], [])["layers"] == []
    assert Cache.open(tmp_path / "out").layer is None


def test_licences_are_joined(inputs, tmp_path: Path) -> None:
    other = altered(inputs[2], tmp_path / "other", licence="MIT", answers=None)
    merge_caches(tmp_path / "out", [inputs[0], other])
    identity = json.loads((tmp_path / "out" / "cache.json").read_text())["identity"]
    assert (identity["licence"], identity["answers"]) == ("CC0-1.0 AND MIT", "given; unknown")


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("victim", ["sequences", "targets", "tokenizer"])
def test_damaged_input_is_refused(inputs, tmp_path: Path, copy: bool, victim: str) -> None:
    damaged = Path(shutil.copytree(inputs[2], tmp_path / "damaged"))
    file = sorted(damaged.joinpath(victim).rglob("*.arrow" if victim != "tokenizer" else "*.json"))[0]
    if victim == "tokenizer":
        damaged, first = inputs[1], damaged
    else:
        first = inputs[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=file.name):
        merge_caches(tmp_path / "out", [first, damaged], copy=copy)
    assert not (tmp_path / "out").exists()


WRONG = [
    (["{root}/a"], 2, "two different caches or more"),
    (["{root}/a", "{root}/a"], 2, "two different caches or more"),
    (["{root}/a", "{root}/nothing"], 2, "is not a cache"),
    (["{root}/a", "{root}/b", "--targets", "x", "--no-targets"], 2, "not allowed with"),
]


@pytest.mark.parametrize("words, code, sentence", WRONG)
def test_wrong_request_is_one_line(inputs, tmp_path: Path, capsys, words, code, sentence) -> None:
    argv = ["cache", "merge", str(tmp_path / "out"), *[word.format(root=inputs[0].parent) for word in words]]
    try:
        assert cli.main(argv) == code
    except SystemExit as left:
        assert left.code == code
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err


def test_command_reports_what_it_did(inputs, tmp_path: Path, capsys) -> None:
    argv = ["cache", "merge", str(tmp_path / "out"), *map(str, inputs)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "6 left out because an earlier row has the same row_key" in text
    assert f"targets top3-sample4-{HYBRID.hash8} left out: it is not in {inputs[1]}, {inputs[2]}" in text
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["existed"] is True

"""A subset holds the rows that its choice means, with their targets byte for byte, and is a cache like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.layer_writer import LayerWriter, part_table
from shared.errors import CacheError, UsageError
from shared.parts.part_stats import targets_stats
from shared.parts.parts import commit_part
from shared.schema import TARGETS
from tests.shared.dense_targets import equal_targets
from tests.shared.small_cache import HYBRID, TOP, build, targets_of
from tools import cli
from tools.cache.cache_subset import Choice, chosen_rows, subset_cache
from tools.cache.row_query import Condition
from tools.cache.staged_directory import publish, staging_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        build(path, layers=(TOP, HYBRID), last=30, rows_per_part=7)
    return path


def rows_of(path: Path, layer: str) -> dict[bytes, tuple]:
    return {row.row_key: row for row in Cache.open(path, layer)}


@pytest.mark.parametrize(
    ("choice", "belongs"),
    [
        (Choice(sources=("math",)), lambda row: row.source == "math"),
        (
            Choice(query='num_tokens < 10 and not source == "code" or finish_reason in ("given", "length")'),
            lambda row: (len(row.token_ids) < 10 and row.source != "code") or row.finish_reason in ("given", "length"),
        ),
        (Choice(query='"prompt 1" in prompt'), lambda row: "prompt 1" in row.prompt),
    ],
)
def test_chosen_rows_come_with_every_layer_as_they_were(cache, tmp_path, choice, belongs):
    result = subset_cache(cache, tmp_path / "out", choice)
    assert list(verify_cache(tmp_path / "out")) == []
    assert [name.split("-")[0] for name in result["layers"]] == ["top3", "top6"]
    for layer in (TOP.name, HYBRID.name):
        before, after = rows_of(cache, layer), rows_of(tmp_path / "out", layer)
        assert after.keys() == {key for key, row in before.items() if belongs(row)}
        assert 0 < len(after) == result["rows"] < len(before)
        for key, row in after.items():
            assert equal_targets(row.targets, before[key].targets)
    assert subset_cache(cache, tmp_path / "out", choice)["existed"]
    with pytest.raises(CacheError, match="exists and is not this subset"):
        subset_cache(cache, tmp_path / "out", Choice(count=1))


@pytest.mark.parametrize(
    "words",
    [
        ["cache", "subset", "CACHE", "CACHE/x", "--count", "3"],
        ["cache", "export", "--targets", TOP.name, "CACHE", "CACHE/deep/er"],
        ["cache", "merge", "CACHE/x", "CACHE", "OTHER"],
        ["cache", "push", "OTHER", "CACHE/x"],
        ["cache", "push", "CACHE", "CACHE/sequences/x"],
        ["cache", "pull", "http://127.0.0.1:1/x", "CACHE/x"],
        ["plan", "RECIPE"],
        ["report", "RUN", "--output", "CACHE"],
    ],
)
def test_nothing_is_written_among_the_files_of_a_cache(cache, tmp_path, capsys, words):
    subset_cache(cache, tmp_path / "other", Choice(count=20))
    (tmp_path / "run").mkdir()
    recipe = f"name: a\noutput_dir: {tmp_path}/run\ncache: {cache}/x\nteacher: {{model: {tmp_path}/run}}\n"
    (tmp_path / "recipe").write_text(recipe + "prompts: [{source: a, path: a.jsonl, format: messages}]\n")
    for name in ("other", "run", "recipe", "cache"):
        words = [word.replace(name.upper(), str(cache if name == "cache" else tmp_path / name)) for word in words]
    before = sorted(cache.rglob("*"))
    assert cli.main(words) == 2
    assert f"lies in the cache {cache}" in capsys.readouterr().err
    assert sorted(cache.rglob("*")) == before


def test_whoever_finishes_second_leaves_nothing_beside_the_same_result(tmp_path):
    out, staging = tmp_path / "out", staging_path(tmp_path / "out", "choosing", "0123456789")
    for place in (out, staging):
        (place / "sequences").mkdir(parents=True)
        (place / "proof").write_text("the same")
    publish(staging, out, out / "proof")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_rows_hold_all_of_fewer_and_seeds_choose_others(cache):
    opened = Cache.open_sequences(cache)
    few, many = (chosen_rows(opened, Choice(count=n, seed=1)) for n in (5, 12))
    assert (few.sum(), many.sum(), (few & ~many).sum()) == (5, 12, 0)
    assert bool((few != chosen_rows(opened, Choice(count=5, seed=2))).any())
    shares = [chosen_rows(opened, Choice(share=share)) for share in (0.2, 0.6, 1.0)]
    assert bool((shares[0] <= shares[1]).all())
    assert bool(shares[2].all())
    assert 0.2 < np.mean(shares[1]) < 1.0
    both = chosen_rows(opened, Choice(sources=("code",), count=3))
    assert {opened.sequence(int(row)).source for row in np.flatnonzero(both)} == {"code"}
    assert both.sum() == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts == 'a'", "no column.*did you mean 'prompt'"),
        ("__import__('os').system('true')", "not understood"),
        ("prompt.upper() == 'A'", "not understood"),
        ("num_tokens <", "no condition"),
        ("num_tokens + 1 < 3", "not understood"),
        ("prompt is reference", "not understood"),
        ("not " * 2000 + "source", "nested deeper"),
        ("num_tokens < 9 or " * 700 + "num_tokens < 3", "may have 10,000"),
    ],
)
def test_conditions_that_are_none_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Condition(text)


def test_condition_on_unlike_kinds_says_so(cache):
    with pytest.raises(UsageError, match="cannot be compared"):
        chosen_rows(Cache.open_sequences(cache), Choice(query="num_tokens < 'a'"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "the cache itself"),
        (("--source", "maths"), 2, "did you mean 'math'"),
        (("--query", "num_tokens > 9999"), 1, "none of its"),
        (("--count", "0"), 2, "is no count"),
        (("--source", "math", "--seed", "3"), 2, "--seed is of --share and --count"),
    ],
)
def test_choices_of_nothing_are_refused(cache, tmp_path, capsys, words, code, message):
    arguments = ["cache", "subset", str(cache), str(tmp_path / "out"), *words]
    try:
        found = cli.main(arguments)
    except SystemExit as left:
        found = left.code
    assert found == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("subset", "cache", "out", "--count", "2"), ("export", "cache", "out")])
def test_a_blob_that_is_none_is_named_by_its_part_and_row(tmp_path, monkeypatch, capsys, words):
    """Checksums fit: whoever wrote the part wrote it so."""
    writer = build(tmp_path / "cache", 0, 4, 4, layers=())
    layer = LayerWriter.create_or_open(writer, None, TOP, {})
    (record,) = writer.sequence_records()
    rows = writer.read_sequences(record)
    positions = [row.num_positions for row in rows]
    table = part_table(TARGETS, [row.key for row in rows], positions, [0.0] * len(rows), [b"none"] * len(rows))
    kept = targets_stats([targets_of(row, TOP) for row in rows], 4 * len(rows))
    commit_part(layer.directory, record.stem, table, kept, {}, ())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cache", *words]) == 1
    assert f"{record.stem}.arrow:" in capsys.readouterr().err.splitlines()[-1]

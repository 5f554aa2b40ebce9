"""Whatever the format, entries that are no distribution are refused, and an import is made once and whole."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import CacheError, DamagedError
from tests.tools.foreign.importing import EXACT, run
from tests.tools.foreign.peers import VOCAB, samples, write_distillkit
from tools import cli
from tools.cache.foreign.foreign_row import ForeignRow
from tools.cache.foreign.heads import to_targets


def test_heads_that_weigh_more_than_one_by_rounding_have_no_tail():
    sample = samples(1)[0]
    row = next(iter(rows_of(sample)))
    row.logprobs[:] = np.log(np.full(row.logprobs.shape, 1.003 / row.logprobs.shape[1]))
    row.logprobs[0] += np.log(1.05)
    counts = Counter()
    targets = to_targets(row, VOCAB, tail="derived", counts=counts)
    assert bool(np.isneginf(targets.tail_logmass).all())
    assert (counts["above_one"], counts["divided"]) == (len(row.predicted), 1)
    assert float(np.exp(targets.logprobs[: targets.counts[0]]).sum()) == pytest.approx(1.0, abs=1e-6)


def rows_of(sample):
    ids, values = sample.top(4)
    predicted = np.arange(1, len(sample.token_ids))
    yield ForeignRow("file:0", np.array(sample.token_ids), predicted, ids[:-1].copy(), values[:-1].copy())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.logprobs.__setitem__((0, 0), np.nan), "no number"),
        (lambda row: row.ids.__setitem__((0, 1), row.ids[0, 0]), "twice"),
        (lambda row: row.logprobs.__setitem__((0, slice(None)), 0.0), "no log-probabilities of one distribution"),
        (lambda row: row.ids.__setitem__((0, 0), -5), "negative"),
    ],
)
def test_entries_of_no_distribution_are_refused_with_their_place(spoil, message):
    row = next(iter(rows_of(samples(1)[0])))
    spoil(row)
    with pytest.raises(DamagedError, match=f"file:0.*{message}"):
        to_targets(row, VOCAB, tail="derived", counts=Counter())


def test_rows_of_another_tokenizer_are_refused(tmp_path, tokenizer_dir, capsys):
    made = samples(2)
    made[1].token_ids[3] = VOCAB + 3
    write_distillkit(tmp_path / "set", made, {**EXACT, "d": 2 * VOCAB})
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert f"token id {VOCAB + 3} and the tokenizer {VOCAB} entries" in error


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**63 + 5])
def test_a_refusal_after_parts_were_made_leaves_nothing(tmp_path, tokenizer_dir, capsys, monkeypatch, token_id):
    made = samples(4)
    write_distillkit(tmp_path / "set", made, EXACT)
    file = sorted((tmp_path / "set").glob("*.parquet"))[-1]
    table = pq.read_table(file)
    kind = pa.list_(pa.uint64() if token_id > 0 else pa.int64())
    ids = pa.array([[*row[:-1], token_id] for row in table["input_ids"].to_pylist()], kind)
    pq.write_table(table.set_column(table.schema.get_field_index("input_ids"), "input_ids", ids), file)
    monkeypatch.setattr("tools.cache.foreign.import_cache._MOST_ROWS", 1)
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert f"{file}:0 has" in error
    assert ("has a token id below 0, or above" in error) == (token_id != VOCAB)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_audit_of_an_imported_cache_is_refused_for_what_it_is(tmp_path, tokenizer_dir, capsys):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    for words in ([], ["--teacher", str(tokenizer_dir)]):
        assert cli.main(["cache", "audit", str(tmp_path / "cache"), *words]) == 1
        assert "was imported, so that nothing tells the weights that made it" in capsys.readouterr().err


@pytest.mark.parametrize("form, name", [("openai", "a.jsonl"), ("axolotl", "a.parquet"), ("distillkit", "a.parquet")])
def test_a_pipe_in_place_of_a_file_is_called_one_and_not_waited_for(tmp_path, tokenizer_dir, capsys, form, name):
    os.mkfifo(tmp_path / name)
    words = [str(tmp_path / name), str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir), "--format", form]
    said = run(capsys, *words, "--teacher", "t", code=1)
    assert f"{name} is a pipe where a cache has a regular file" in said


@pytest.mark.parametrize("is_named", [False, True])
def test_files_whose_endings_are_in_capitals_are_found(tmp_path, tokenizer_dir, capsys, is_named):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    file = (tmp_path / "set" / "data_0.parquet").rename(tmp_path / "set" / "DATA_0.PARQUET")
    result = run(capsys, file if is_named else tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert (result["format"], result["rows"]) == ("DistillKit", 1 if is_named else 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--tokenizer"),
        (("--tokenizer", "DIR", "--shift", "1"), "--shift means nothing for the format distillkit"),
        (("--tokenizer", "DIR", "--split-at", "<none>"), "no such token"),
        (("--tokenizer", "DIR", "--format", "megatron"), "--token-ids"),
        (("--tokenizer", "DIR", "--format", "axolotl", "--temperature", "0"), "'0' is no temperature"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path, tokenizer_dir, capsys, words, message):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    words = [tokenizer_dir if word == "DIR" else word for word in words]
    assert message in run(capsys, tmp_path / "set", tmp_path / "cache", *words, code=2)


def test_a_killed_import_is_continued_and_repeated_rows_are_named(tmp_path, tokenizer_dir, capsys, monkeypatch):
    made = samples(5)
    write_distillkit(tmp_path / "set", [*made, made[0]], EXACT)
    words = (tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    monkeypatch.setattr("tools.cache.foreign.import_cache._MOST_ROWS", 2)
    monkeypatch.setattr("tools.cache.staged_directory.publish", lambda *a: (_ for _ in ()).throw(CacheError("cut")))
    assert "cut" in run(capsys, *words, code=1)
    monkeypatch.undo()
    monkeypatch.setattr("tools.cache.foreign.import_cache._MOST_ROWS", 2)
    monkeypatch.setattr(
        "shared.cache.writing.cache_writer.CacheWriter.write_sequences", None
    )  # nothing is written again
    result = run(capsys, *words)
    assert (result["rows"], result["parts"]) == (5, 3)
    assert result["set_aside"] == {"an earlier row has the same tokens": 1}
    shutil.rmtree(tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]

"""What is exported to others holds the cache's heads in their layout, and comes back as far as their format goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.cache.cache import Cache
from shared.errors import CacheError
from tests.shared.dense_targets import cut
from tests.shared.small_cache import HYBRID, TOP, VOCAB, build
from tests.tools.foreign.importing import run
from tests.tools.foreign.peers import distillkit_reads, samples, write_axolotl
from tools import cli
from tools.cache.foreign.axolotl import AxolotlReader
from tools.cache.foreign.distillkit import DistillKitReader


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    build(path, layers=(TOP, HYBRID))
    return path


def export(capsys, cache, out, form, layer):
    assert cli.main(["cache", "export", str(cache), str(out), "--format", form, "--targets", layer, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def heads(row):
    offsets = row.targets.offsets()
    for s, place in enumerate(row.predictor_index().tolist()):
        head = slice(offsets[s], offsets[s + 1])
        yield place, row.targets.ids[head], row.targets.logprobs[head]


def test_distillkit_reads_the_heads_of_the_cache(cache, tmp_path, capsys):
    result = export(capsys, cache, tmp_path / "out", "distillkit", TOP.name)
    assert export(capsys, cache, tmp_path / "out", "distillkit", TOP.name) == {**result, "existed": True}
    settings = json.loads((tmp_path / "out" / "compression_config.yaml").read_text())
    said = [row for file in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    for row, found, (ids, values) in zip(
        Cache.open(cache, TOP.name), said, distillkit_reads(tmp_path / "out", settings), strict=True
    ):
        assert found["input_ids"] == row.token_ids.tolist()
        labels = np.full(len(row.token_ids), -100)
        labels[row.supervised_index()] = row.labels()
        assert found["labels"] == labels.tolist()
        assert all(len(set(named)) == len(named) for named in ids)
        supervised = {place: head for place, *head in heads(row)}
        for place in range(len(ids)):
            expected_ids, expected = supervised.get(
                place, ([*row.token_ids, row.token_ids[-1]][place + 1 :][:1], [0.0])
            )
            assert ids[place][: len(expected_ids)] == [int(i) for i in expected_ids]
            assert values[place][: len(expected)].tolist() == np.asarray(expected, np.float64).tolist()
            assert bool((values[place][len(expected) :] == -10_000).all())


def test_distillkit_export_comes_back_with_a_derived_tail(cache, tmp_path, capsys):
    export(capsys, cache, tmp_path / "out", "distillkit", HYBRID.name)
    reader = DistillKitReader(tmp_path / "out", None, ())
    assert (reader.tail, reader.labels, reader.k) == ("derived", "head", HYBRID.k)
    for row, back in zip(Cache.open(cache, HYBRID.name), reader.rows(), strict=True):
        assert back.token_ids.tolist() == row.token_ids.tolist()
        assert back.predicted.tolist() == row.supervised_index().tolist()
        for s, (_, ids, logprobs) in enumerate(heads(row)):
            there = back.logprobs[s] > -100
            assert back.ids[s][there].tolist() == ids.tolist()
            assert np.array_equal(np.float32(back.logprobs[s][there]), logprobs)
            tail = 1 - np.exp(back.logprobs[s][there]).sum()
            assert tail == pytest.approx(float(np.exp(row.targets.tail_logmass[s, 0])), abs=1e-6)


def test_axolotl_export_comes_back_within_the_head(cache, tmp_path, capsys):
    export(capsys, cache, tmp_path / "out", "axolotl", TOP.name)
    reader = AxolotlReader(tmp_path / "out", 1.0, 1)
    assert (reader.tail, reader.labels) == ("unknown", "head")
    for row, back in zip(Cache.open(cache, TOP.name), reader.rows(), strict=True):
        assert back.token_ids.tolist() == row.token_ids.tolist()
        assert back.predicted.tolist() == row.supervised_index().tolist()
        for s, (_, ids, logprobs) in enumerate(heads(row)):
            there = back.logprobs[s] > -100
            assert back.ids[s][there].tolist() == ids.tolist()
            within = logprobs - np.log(np.exp(logprobs.astype(np.float64)).sum())
            np.testing.assert_allclose(back.logprobs[s][there], within, atol=1e-6)
            assert float(np.exp(back.logprobs[s]).sum()) == pytest.approx(1.0, abs=1e-6)


def test_axolotl_rows_lie_beside_the_hidden_state_that_predicts(cache, tmp_path, capsys):
    """Its loss takes labels one to the left and rows of targets as they are, and keeps what the mask keeps."""
    export(capsys, cache, tmp_path / "out", "axolotl", TOP.name)
    said = [row for file in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    for found in said:
        shifted = [*found["labels"][1:], -100]
        masked = [any(mask) for mask in found["target_mask"]]
        assert masked == [label != -100 for label in shifted]
        assert len({len(ids) for ids in found["target_token_ids"]}) == 1


def test_caches_without_heads_are_not_exported_to_others(cache, tmp_path, capsys):
    shutil.copytree(cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "targets")
    words = ["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out"), "--format", "axolotl"]
    assert cli.main(words) == 2
    assert "export as parquet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_right_up_to_a_factor_are_not_exported_as_log_probabilities(tmp_path, tokenizer_dir, capsys):
    write_axolotl(tmp_path / "kd.parquet", samples(2), 4, temperature=1.0, shift=1)
    run(capsys, tmp_path / "kd.parquet", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--shift", 1)
    words = ["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out"), "--format"]
    assert (cli.main([*words, "distillkit"]), cli.main([*words, "axolotl"])) == (2, 0)
    assert "heads right up to a factor" in capsys.readouterr().err


def test_what_a_killed_export_left_is_not_taken_for_another_format(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.cache.staged_directory.publish", lambda *a: (_ for _ in ()).throw(CacheError("x")))
    words = ["cache", "export", str(cache), str(tmp_path / "out"), "--targets", TOP.name, "--format"]
    assert cli.main([*words, "axolotl"]) == 1
    monkeypatch.undo()
    capsys.readouterr()
    export(capsys, cache, tmp_path / "out", "distillkit", TOP.name)
    assert all("bytepacked_indices" in pq.read_schema(file).names for file in (tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize("how", [{"label": "head"}, {"k": VOCAB}, {"k": VOCAB, "label": "head"}, {"k": VOCAB + 7}])
def test_heads_of_every_width_go_to_others(tmp_path, capsys, monkeypatch, how):
    """Also those with the label beside k others, and of a k that no vocabulary fills."""

    def full(row, layer):
        counts = np.full(row.num_positions, min(layer.most_entries, VOCAB))
        return cut(np.random.default_rng(1), row.num_positions, VOCAB, counts, (1.0,), 0).targets

    monkeypatch.setattr("tests.shared.small_cache.targets_of", full)
    build(tmp_path / "cache", layers=(replace(TOP, temperatures=(1.0,), **how),))
    rows = list(Cache.open(tmp_path / "cache"))
    for form, reader in (("distillkit", lambda path: DistillKitReader(path, None, ())), ("axolotl", axolotl_reader)):
        export(capsys, tmp_path / "cache", tmp_path / form, form, f"top{how.get('k', TOP.k)}")
        for row, back in zip(rows, reader(tmp_path / form).rows(), strict=True):
            assert back.predicted.tolist() == row.supervised_index().tolist()
            assert [back.ids[s][back.logprobs[s] > -100].tolist() for s in range(len(back.ids))] == [
                ids.tolist() for _, ids, _ in heads(row)
            ]


def test_positions_without_a_head_are_no_distribution_to_others(tmp_path, capsys, monkeypatch):
    """As within a teacher's token of a translated cache: DistillKit needs a row there, which nothing may learn from."""

    def every_third(row, layer):
        counts = np.where(np.arange(row.num_positions) % 3 == 1, 0, 2)
        return cut(np.random.default_rng(1), row.num_positions, VOCAB, counts, (1.0,), 0).targets

    monkeypatch.setattr("tests.shared.small_cache.targets_of", every_third)
    build(tmp_path / "cache", layers=(replace(TOP, temperatures=(1.0,)),))
    rows = list(Cache.open(tmp_path / "cache"))
    for form, reader in (("distillkit", lambda path: DistillKitReader(path, None, ())), ("axolotl", axolotl_reader)):
        export(capsys, tmp_path / "cache", tmp_path / form, form, TOP.name)
        for row, back in zip(rows, reader(tmp_path / form).rows(), strict=True):
            assert back.predicted.tolist() == row.supervised_index()[row.targets.counts > 0].tolist()


def axolotl_reader(path):
    return AxolotlReader(path, 1.0, 1)


@pytest.mark.parametrize("form", ["axolotl", "distillkit"])
def test_parts_without_rows_make_no_file(tmp_path, capsys, form):
    build(tmp_path / "cache", 6, 10, 1)  # all of the first part's rows were set aside
    result = export(capsys, tmp_path / "cache", tmp_path / "out", form, TOP.name)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert (result["rows"], result["files"]) == (3, 3) == (sum(pq.read_table(f).num_rows for f in files), len(files))
    build(tmp_path / "empty", 6, 7, 1)
    words = ["cache", "export", str(tmp_path / "empty"), str(tmp_path / "none"), "--format", form]
    assert cli.main(words) == 1 and "has no rows" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_exported_distillkit_is_imported_by_the_command(tmp_path, tokenizer_dir, capsys):
    build(tmp_path / "cache", layers=(replace(TOP, temperatures=(1.0,)),))
    export(capsys, tmp_path / "cache", tmp_path / "out", "distillkit", TOP.name)
    words = ["cache", "import", str(tmp_path / "out"), str(tmp_path / "back")]
    assert cli.main([*words, "--tokenizer", str(tokenizer_dir)]) == 0
    before, after = Cache.open(tmp_path / "cache"), Cache.open(tmp_path / "back", verify=True)
    assert after.layer.tail == "derived"
    for a, b in zip(before, after, strict=True):
        assert (a.token_ids.tolist(), a.spans.tolist()) == (b.token_ids.tolist(), b.spans.tolist())
        assert a.targets.ids.tolist() == b.targets.ids.tolist()
        np.testing.assert_allclose(a.targets.logprobs, b.targets.logprobs, atol=2e-3)
        np.testing.assert_allclose(np.exp(a.targets.tail_logmass), np.exp(b.targets.tail_logmass), atol=2e-3)

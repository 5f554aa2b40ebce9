"""DistillKit's files are read as its own decoders read them, and what they do not say is marked."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from tests.tools.foreign.importing import EXACT, assert_holds, assert_near_float32, run
from tests.tools.foreign.peers import (
    VOCAB,
    Sample,
    distillkit_reads,
    older_distillkit_reads,
    samples,
    settings_of,
    write_distillkit,
    write_older_distillkit,
    write_raw_distillkit,
)
from tools.cache.foreign.distillkit import DistillKitReader

BIN = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 5}
SETTINGS = {
    "exact alone": EXACT,
    "the published set's": settings_of(polynomial_terms=[0, 1, 2], delta_encoding=True),
    "half types and roots": settings_of(
        exact_dtype="bfloat16", term_dtype="float16", polynomial_terms=[0, 1, 2, "sqrt"]
    ),
    "exponent of a share of the ranks": settings_of(
        polynomial_terms=[0, 1, "exp"], normalize_t=True, exact_dtype="float64"
    ),
    "residual bins": settings_of(residual_bins=[BIN, {**BIN, "element_bits": 1, "num_elements": 2}]),
    "residuals alone, diffused": settings_of(
        polynomial_terms=None,
        residual_bins=[{**BIN, "element_bits": 7, "num_elements": 8, "scale_dtype": "bfloat16"}],
        delta_encoding=True,
        error_diffusion=True,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_distillkit_values_are_those_of_its_own_decoder(tmp_path, name):
    made, settings = samples(4), SETTINGS[name]
    write_distillkit(tmp_path / "set", made, settings)
    rows = list(DistillKitReader(tmp_path / "set", None, ()).rows())
    assert [row.token_ids.tolist() for row in rows] == [sample.token_ids for sample in made]
    for row, (ids, values) in zip(rows, distillkit_reads(tmp_path / "set", settings), strict=True):
        assert row.predicted.tolist() == list(range(1, len(ids)))
        assert row.ids.tolist() == ids[:-1]
        assert_near_float32(row.logprobs, values[:-1])


def test_distillkit_becomes_a_cache_with_a_derived_tail(tmp_path, tokenizer_dir, capsys):
    made, settings = samples(6), SETTINGS["residual bins"]
    write_distillkit(tmp_path / "set", made, settings)
    result = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--teacher", "big/one")
    cache = Cache.open(tmp_path / "cache", verify=True)
    assert list(verify_cache(tmp_path / "cache")) == []
    assert (cache.layer.tail, cache.layer.labels, cache.layer.teacher, cache.layer.k) == (
        "derived",
        "head",
        "big/one",
        12,
    )
    assert (result["rows"], result["tail"], result["set_aside"]) == (6, "derived", {})
    for i, (ids, values) in enumerate(distillkit_reads(tmp_path / "set", settings)):
        assert cache[i].token_ids.tolist() == made[i].token_ids
        assert_holds(cache, i, ids[:-1], values[:-1], tail="derived")
        for s, label in enumerate(cache[i].labels().tolist()):  # known where the head names it, else -inf
            known = dict(zip(ids[s], values[s], strict=True)).get(label, -np.inf)
            assert cache[i].targets.label_logprobs[s] == pytest.approx(min(known, 0.0), abs=2e-3)
    again = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--teacher", "big/one")
    assert again["existed"]
    assert "exists and is not" in run(
        capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=2
    )


def test_older_distillkit_is_right_up_to_a_constant_so_its_tail_is_unknown(tmp_path, tokenizer_dir, capsys):
    made = samples(3)
    settings = {"k": 12, "exact_k": 5, "polynomial_degree": 2, "vocab_size": VOCAB, "with_sqrt_term": True}
    settings |= {"invert_polynomial": True, "term_dtype": "float32"}
    write_older_distillkit(tmp_path / "set", made, settings)
    run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    cache = Cache.open(tmp_path / "cache")
    assert cache.layer.tail == "unknown"
    rows = list(DistillKitReader(tmp_path / "set", None, ()).rows())
    for i, (ids, logits) in enumerate(older_distillkit_reads(tmp_path / "set", settings)):
        assert rows[i].ids.tolist() == ids[:-1]
        within = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        np.testing.assert_allclose(rows[i].logprobs, within[:-1], atol=1e-5)
        assert_holds(cache, i, ids[:-1], within[:-1], tail="unknown")


def test_raw_distillkit_entries_are_taken_as_they_are(tmp_path):
    made = samples(3)
    write_raw_distillkit(tmp_path / "raw.parquet", made, 7)
    reader = DistillKitReader(tmp_path / "raw.parquet", None, ())
    assert reader.k == 7
    for row, sample in zip(reader.rows(), made, strict=True):
        ids, values = sample.top(7)
        assert np.array_equal(row.ids, ids[:-1])
        assert_near_float32(row.logprobs, values[:-1])


def packed(made: list[Sample]) -> Sample:
    joined = Sample([t for s in made for t in s.token_ids], np.concatenate([s.logprobs for s in made]))
    return Sample([*joined.token_ids, 0, 0], np.concatenate([joined.logprobs, joined.logprobs[:2]]))  # padding


@pytest.mark.parametrize("boundary", ["attention_mask", "position_ids", "token", None])
def test_packed_samples_are_split_where_their_boundaries_are_known(tmp_path, boundary):
    made = samples(3)
    for sample in made:
        sample.token_ids[-1] = 1
    one = packed(made)
    lengths = [len(sample.token_ids) for sample in made]
    columns = {
        "attention_mask": {"attention_mask": [[n + 1 for n, size in enumerate(lengths) for _ in range(size)] + [0, 0]]},
        "position_ids": {"position_ids": [[t for size in (*lengths, 2) for t in range(size)]]},
    }.get(boundary, {})
    write_distillkit(tmp_path / "set", [one], EXACT, **columns)
    rows = list(DistillKitReader(tmp_path / "set", None, [1] if boundary == "token" else ()).rows())
    if boundary is None:
        assert [row.token_ids.tolist() for row in rows] == [one.token_ids]
        return
    assert [row.token_ids.tolist() for row in rows][:3] == [sample.token_ids for sample in made]
    for row, sample in zip(rows, made, strict=False):  # nothing predicts the first token of another document
        assert row.predicted.tolist() == list(range(1, len(sample.token_ids)))
        assert np.array_equal(row.ids, sample.top(12)[0][:-1])


def test_masked_labels_of_a_sample_are_not_supervised(tmp_path, tokenizer_dir, capsys):
    made = samples(2)
    labels = [[-100] * 4 + sample.token_ids[4:] for sample in made]
    write_distillkit(tmp_path / "set", made, EXACT, labels=labels)
    run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    cache = Cache.open(tmp_path / "cache")
    assert [row.spans.tolist() for row in cache] == [[[4, len(sample.token_ids)]] for sample in made]


def spoil_settings(directory, **changes):
    file = directory / "compression_config.yaml"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: spoil_settings(d, exact_k=5), "settings ask for"),
        (lambda d: spoil_settings(d, k=10**9), "says k"),
        (lambda d: spoil_settings(d, d=2), "settings ask for|names a token id"),
        (lambda d: spoil_settings(d, unheard_of=1), "unheard_of"),
        (lambda d: (d / "compression_config.yaml").unlink(), "--compression"),
        (lambda d: (d / "data_1.parquet").write_bytes(b"PAR1 no file PAR1"), "data_1.parquet cannot be imported"),
        (lambda d: pq.write_table(pa.table({"input_ids": [[1]]}), d / "data_1.parquet"), "no column"),
        (lambda d: pq.write_table(pa.table({"x": [1]}), d / "data_0.parquet"), "expected input_ids with"),
    ],
)
def test_damaged_distillkit_is_refused_in_one_sentence(tmp_path, tokenizer_dir, capsys, spoil, message):
    write_distillkit(tmp_path / "set", samples(2), SETTINGS["residual bins"])
    spoil(tmp_path / "set")
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert re.search(message, error)
    assert sum("error" in line for line in error.splitlines()) == 1
    assert not (tmp_path / "cache").exists()

"""Caches of others are read as their own projects read them, and what they do not say is marked."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.cache import Cache, verify_cache
from shared.errors import CacheError, DamagedError
from tests.tiny_models import make_tokenizer
from tests.tools.foreign.peers import (
    VOCAB,
    Sample,
    chat_line,
    completion_line,
    distillkit_reads,
    older_distillkit_reads,
    prompt_logprobs_line,
    samples,
    settings_of,
    spelled,
    write_axolotl,
    write_distillkit,
    write_megatron,
    write_older_distillkit,
    write_raw_distillkit,
)
from tools import cli
from tools.cache.foreign.axolotl import AxolotlReader
from tools.cache.foreign.distillkit import DistillKitReader
from tools.cache.foreign.heads import to_targets
from tools.cache.foreign.megatron import MegatronReader
from tools.cache.foreign.openai_json import OpenAIReader

STEP = 0.0625
BIN = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 5}
SETTINGS = {
    "exact alone": settings_of(exact_k=12, polynomial_terms=None),
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


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def run(capsys, *words, code=0):
    assert cli.main([str(word) for word in ("cache", "import", *words, "--json")]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def assert_near_float32(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def assert_holds(cache: Cache, row: int, expected_ids, expected_values, *, tail=None):
    """The codec's bounds: same ids in order, distances to the first within half a step, the head's mass 1 - tail."""
    targets = cache[row].targets
    offsets = targets.offsets()
    for s, (ids, values) in enumerate(zip(expected_ids, expected_values, strict=True)):
        order = sorted(range(len(ids)), key=lambda j: -values[j])
        there = [j for j in order if values[j] > -100]
        head = slice(offsets[s], offsets[s + 1])
        assert targets.ids[head].tolist() == [ids[j] for j in there]
        wanted = np.array([values[j] for j in there])
        assert (
            np.abs((targets.logprobs[head] - targets.logprobs[head][0]) - (wanted - wanted[0])).max() <= STEP / 2 + 1e-4
        )
        if tail == "derived":
            rest = max(1 - float(np.exp(wanted).sum()), 0.0)
            assert float(np.exp(targets.tail_logmass[s, 0])) == pytest.approx(rest, abs=6e-3, rel=6e-3)
    if tail == "unknown":
        assert bool(np.isnan(targets.tail_logmass).all())


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
        capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1
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
    write_distillkit(tmp_path / "set", [one], SETTINGS["exact alone"], **columns)
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
    write_distillkit(tmp_path / "set", made, SETTINGS["exact alone"], labels=labels)
    run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    cache = Cache.open(tmp_path / "cache")
    assert [row.spans.tolist() for row in cache] == [[[4, len(sample.token_ids)]] for sample in made]


@pytest.mark.parametrize("shift", [0, 1])
def test_axolotl_rows_are_aligned_by_measuring_and_their_tail_is_unknown(tmp_path, tokenizer_dir, capsys, shift):
    made = samples(5, least=20, most=30)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=2.0, shift=shift)
    words = (tmp_path / "kd.parquet", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--temperature", 2)
    result = run(capsys, *words)
    assert (result["format"], result["tail"]) == ("Axolotl", "unknown")
    assert result["notes"]["rows are about token"] == f"i + {shift}"
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        assert cache[i].spans.tolist() == [[3, len(sample.token_ids)]]
        ids, values = sample.top(6)  # p at temperature 1 within the head comes back from p at temperature 2
        values = values - np.log(np.exp(values).sum(1, keepdims=True))
        assert_holds(cache, i, ids[2:-1], values[2:-1], tail="unknown")


def test_axolotl_values_are_read_as_they_stand(tmp_path):
    made = samples(3, least=20, most=30)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=1.0, shift=1)
    for row, said in zip(
        AxolotlReader(tmp_path / "kd.parquet", 1.0, None).rows(),
        pq.read_table(tmp_path / "kd.parquet").to_pylist(),
        strict=True,
    ):
        assert row.ids.tolist() == said["target_token_ids"][2:-1]
        assert_near_float32(row.logprobs, said["target_logprobs"][2:-1])


def test_axolotl_alignment_that_is_not_clear_is_asked_for(tmp_path):
    made = samples(3)
    for sample in made:
        sample.token_ids = [7] * len(sample.token_ids)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=1.0, shift=1)
    with pytest.raises(CacheError, match="say --shift 0 or --shift 1"):
        AxolotlReader(tmp_path / "kd.parquet", 1.0, None)


@pytest.mark.parametrize("nucleus", [None, 0.8])
def test_megatron_shards_join_their_tokens_in_training_order(tmp_path, tokenizer_dir, capsys, nucleus):
    made = samples(8, least=12, most=13)
    ids_file = write_megatron(tmp_path / "shards", made, 10, nucleus=nucleus)
    reader = MegatronReader(tmp_path / "shards", ids_file)
    for row, sample in zip(reader.rows(), made, strict=True):
        ids, values = sample.top(10)
        stored = np.float16(values[:-1]).astype(np.float64)
        if nucleus is not None:
            cut = np.exp(values).cumsum(1)[:-1] - np.exp(values[:-1]) >= nucleus
            stored[cut] = -np.inf
        assert row.token_ids.tolist() == sample.token_ids
        assert np.array_equal(row.logprobs, stored)
        assert np.array_equal(row.ids[stored > -np.inf], ids[:-1][stored > -np.inf])
    result = run(capsys, tmp_path / "shards", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--token-ids", ids_file)
    assert (result["rows"], result["tail"], result["format"]) == (8, "derived", "Megatron-LM")
    if nucleus is None:
        ids, values = (part[:-1].tolist() for part in made[0].top(10))
        assert_holds(Cache.open(tmp_path / "cache"), 0, ids, np.float16(values).astype(float), tail="derived")


def test_megatron_pickles_are_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    import zstandard

    ids_file = write_megatron(tmp_path / "shards", samples(8, least=12, most=13), 4)
    shard = tmp_path / "shards" / "cp0_dp0__11.tar"
    with tarfile.open(shard) as tar:
        meta = tar.extractfile("_meta.json").read()
    with tarfile.open(shard, "w") as tar:
        payload = zstandard.ZstdCompressor().compress(pickle.dumps({"values": Runs()}))
        for name, data in (("_meta.json", meta), ("10.pt.zst", payload)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DamagedError, match="step 10 is no step of saved log-probabilities"):
        list(MegatronReader(tmp_path / "shards", ids_file).rows())
    assert not (tmp_path / "was-run").exists()


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(tokenizer, made):
    messages = [{"role": "user", "content": "How many apples are left?"}]
    return messages, [chat_line(tokenizer, messages, sample, 5) for sample in made]


def test_chat_completions_are_told_by_bytes_with_every_label(tmp_path, tokenizer, tokenizer_dir, capsys):
    made = samples(3, seed=3)
    messages, lines = answers(tokenizer, made)
    lines[1] = {"custom_id": "a", "request": {"body": {"messages": messages}}, "response": {"body": lines[1]}}
    file = write_lines(tmp_path / "answers.jsonl", lines)
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert (result["tail"], result["labels"], result["rows"]) == ("unknown", "all", 3)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        row = cache[i]
        assert row.token_ids.tolist() == [*prompt, *sample.token_ids[1:]]
        assert row.spans.tolist() == [[len(prompt), len(row.token_ids)]]
        assert (row.prompt, row.finish_reason) == (messages[0]["content"], "stop")
        labels = sample.logprobs[np.arange(len(sample.token_ids) - 1), sample.token_ids[1:]]
        np.testing.assert_allclose(row.targets.label_logprobs, labels, atol=2e-3)
        ids, values = (part[:-1].tolist() for part in sample.top(5))
        for s, label in enumerate(sample.token_ids[1:]):
            if label not in ids[s]:
                ids[s], values[s] = [*ids[s], label], [*values[s], labels[s]]
        assert_holds(cache, i, ids, values, tail="unknown")


def test_raw_values_of_a_server_have_a_derived_tail(tmp_path, tokenizer, tokenizer_dir, capsys):
    file = write_lines(tmp_path / "answers.jsonl", answers(tokenizer, samples(2, seed=3))[1])
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir, "--tail", "derived")
    assert result["tail"] == "derived"
    assert not bool(np.isnan(Cache.open(tmp_path / "cache")[0].targets.tail_logmass).any())


def test_completions_are_told_by_text_and_torn_ones_are_set_aside(tmp_path, tokenizer, tokenizer_dir, capsys):
    whole = [i for i in range(VOCAB) if "\ufffd" not in spelled(tokenizer, i, 0.0)["token"]]
    made = samples(3, seed=5)
    for sample in made[:2]:
        sample.token_ids[1:] = [whole[t % len(whole)] for t in sample.token_ids[1:]]
    torn = next(i for i in range(3, VOCAB) if i not in whole)
    made[2].token_ids[2] = torn
    lines = [completion_line(tokenizer, f"Sort {n} numbers", sample, 5) for n, sample in enumerate(made)]
    result = run(capsys, write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", "--tokenizer", tokenizer_dir)
    assert result["set_aside"] == {"a token of the answer is none of the tokenizer's": 1}
    cache = Cache.open(tmp_path / "cache")
    assert len(cache) == 2
    for i, sample in enumerate(made[:2]):
        ids, _values = sample.top(5)
        prompt = tokenizer(f"Sort {i} numbers")["input_ids"]
        assert cache[i].token_ids.tolist() == [*prompt, *sample.token_ids[1:]]
        for s, label in enumerate(sample.token_ids[1:]):
            offsets = cache[i].targets.offsets()
            named = set(cache[i].targets.ids[offsets[s] : offsets[s + 1]].tolist())
            assert named == ({j for j in ids[s].tolist() if j in whole} | {label})


def test_prompt_logprobs_score_a_whole_text_by_id(tmp_path, tokenizer_dir, tokenizer, capsys):
    made = samples(2, seed=7)
    file = write_lines(tmp_path / "scored.jsonl", [prompt_logprobs_line(sample, 5) for sample in made])
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir, "--tail", "derived")
    assert result["rows"] == 2
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        assert cache[i].token_ids.tolist() == sample.token_ids
        ids, values = (part[:-1].tolist() for part in sample.top(5))
        for s, label in enumerate(sample.token_ids[1:]):
            if label not in ids[s]:
                ids[s], values[s] = [*ids[s], label], [*values[s], sample.logprobs[s, label]]
        assert_holds(cache, i, ids, values, tail="derived")


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
    from tools.cache.foreign.foreign_row import ForeignRow

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
    import re

    write_distillkit(tmp_path / "set", samples(2), SETTINGS["residual bins"])
    spoil(tmp_path / "set")
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert re.search(message, error)
    assert sum("error" in line for line in error.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_rows_of_another_tokenizer_are_refused(tmp_path, tokenizer_dir, capsys):
    made = samples(2)
    made[1].token_ids[3] = VOCAB + 3
    write_distillkit(tmp_path / "set", made, {**SETTINGS["exact alone"], "d": 2 * VOCAB})
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert f"token id {VOCAB + 3} and the tokenizer {VOCAB} entries" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--tokenizer"),
        (("--tokenizer", "DIR", "--shift", "1"), "--shift means nothing for the format distillkit"),
        (("--tokenizer", "DIR", "--split-at", "<none>"), "no such token"),
        (("--tokenizer", "DIR", "--format", "megatron"), "--token-ids"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path, tokenizer_dir, capsys, words, message):
    write_distillkit(tmp_path / "set", samples(2), SETTINGS["exact alone"])
    words = [tokenizer_dir if word == "DIR" else word for word in words]
    assert message in run(capsys, tmp_path / "set", tmp_path / "cache", *words, code=2)


def test_a_killed_import_is_continued_and_repeated_rows_are_named(tmp_path, tokenizer_dir, capsys, monkeypatch):
    made = samples(5)
    write_distillkit(tmp_path / "set", [*made, made[0]], SETTINGS["exact alone"])
    words = (tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir)
    monkeypatch.setattr("tools.cache.foreign.import_cache._MOST_ROWS", 2)
    monkeypatch.setattr("tools.cache.foreign.import_cache.publish", lambda *a: (_ for _ in ()).throw(CacheError("cut")))
    assert "cut" in run(capsys, *words, code=1)
    monkeypatch.undo()
    monkeypatch.setattr("tools.cache.foreign.import_cache._MOST_ROWS", 2)
    monkeypatch.setattr("shared.cache.cache_writer.CacheWriter.write_sequences", None)  # nothing is written again
    result = run(capsys, *words)
    assert (result["rows"], result["parts"]) == (5, 3)
    assert result["set_aside"] == {"an earlier row has the same tokens": 1}
    shutil.rmtree(tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_answers_without_prompt_or_log_probabilities_say_what_to_ask_for(tmp_path, tokenizer, tokenizer_dir, capsys):
    _, (line,) = answers(tokenizer, samples(1))
    del line["messages"]
    error = run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "c", "--tokenizer", tokenizer_dir, code=1)
    assert "a.jsonl:1 has no prompt" in error
    line["choices"][0]["logprobs"] = None
    error = run(capsys, write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "c", "--tokenizer", tokenizer_dir, code=1)
    assert "a.jsonl:1 has no top log-probabilities" in error
    file = write_lines(tmp_path / "b.jsonl", [{}])
    with pytest.raises(DamagedError, match="has no choices"):
        OpenAIReader(file, tokenizer, (tokenizer_dir / "tokenizer.json").read_bytes())

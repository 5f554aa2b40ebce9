"""Reader and writer: every row by number, in any process, and every wrong request in one sentence."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.garbage import collect_garbage
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError, DamagedError, IdentityError, ModelError
from shared.parts.jobs import committed_keys
from shared.parts.part_stats import position_entropy_nats
from tests.shared.altered import edit
from tests.shared.dense_targets import equal_targets
from tests.shared.small_cache import (
    HYBRID,
    SEQUENCES,
    SOFTWARE,
    TOKENIZER,
    TOP,
    VOCAB,
    build,
    plan_rows,
    score,
    sequence,
    targets_of,
    tree,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    build(path, layers=(TOP, HYBRID))
    return path


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def opened(path: Path) -> Cache:
    return Cache.open(path, targets="top6")


def test_rows_come_back_as_written(path: Path) -> None:
    cache = opened(path)
    written = [sequence(row) for row in plan_rows(0, 10) if row.line % 7]
    assert len(cache) == len(written) == 9
    for i, row in enumerate(written):
        got = cache[i]
        for name in ("key", "row_key", "group_key", "source", "prompt", "response", "reference", "finish_reason"):
            assert getattr(got, name) == getattr(row, name)
        assert np.array_equal(got.token_ids, row.token_ids)
        assert np.array_equal(got.spans, row.spans)
        assert got.targets is not None
        codec = TOP.make_codec()
        assert equal_targets(got.targets, codec.decode(codec.encode(targets_of(row, TOP)), row.num_positions))
        assert np.array_equal(cache.sequence(i).token_ids, row.token_ids)
        assert cache.num_tokens[i] == len(row.token_ids)
        assert cache.group_keys[i].tobytes() == row.group_key
        assert cache.source_names[cache.sources[i]] == row.source
    assert cache[-1].key == cache[8].key
    for index in (9, -10):
        with pytest.raises(IndexError):
            cache[index]


def test_position_rule() -> None:
    tokens, spans = np.arange(100, 110, dtype=np.int32), np.array([[1, 3], [3, 4], [7, 10]], np.int32)
    row = dataclasses.replace(sequence(next(plan_rows(0, 1))), token_ids=tokens, spans=spans)
    assert row.num_positions == 6
    assert row.labels().tolist() == [101, 102, 103, 107, 108, 109]
    assert row.predictor_index().tolist() == [0, 1, 2, 6, 7, 8]
    empty = dataclasses.replace(row, spans=np.zeros((0, 2), np.int32))
    assert (empty.num_positions, len(empty.labels()), len(empty.predictor_index())) == (0, 0, 0)


def test_lengths_and_groups_are_known_without_reading_tokens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.parts.parts.hash_file", lambda *_: pytest.fail("a part was read as a whole"))
    monkeypatch.setattr("shared.parts.mapped_part.MappedSequences.row", lambda *_: pytest.fail("a row was read"))
    cache = opened(path)
    assert cache.num_tokens.dtype == cache.sources.dtype == np.int32
    assert cache.group_keys.dtype == np.dtype("V16")
    assert cache.stats()["rows"] == len(cache.num_tokens)


def test_layers_are_chosen_by_short_or_full_name(path: Path) -> None:
    names = {f"top6-{TOP.hash8}": TOP, f"top3-sample4-{HYBRID.hash8}": HYBRID}
    assert opened(path).layers() == names
    for wanted in ("top3-sample4", f"top3-sample4-{HYBRID.hash8}"):
        cache = Cache.open(path, targets=wanted)
        assert cache.layer == HYBRID
        assert cache[0].targets is not None
        assert len(cache[0].targets.draws) == 1
    with pytest.raises(CacheError, match=r"has 2 targets layers \(top3-sample4-\w+, top6-\w+\); name the one to use"):
        Cache.open(path)
    with pytest.raises(CacheError, match=r"has no targets layer named 'top64' \(there are: top3"):
        Cache.open(path, targets="top64")


def test_cache_without_layers_has_sequences_only(copy: Path) -> None:
    shutil.rmtree(copy / "targets")
    cache = Cache.open(copy)
    assert cache.layer is None
    assert cache[0].targets is None
    assert "mean_support" not in cache.stats()


def test_sequences_open_without_targets_however_many_layers_there_are(path: Path) -> None:
    cache = Cache.open_sequences(path)
    assert cache.layer is None
    assert [row.key for row in cache] == [row.key for row in opened(path)]
    assert all(row.targets is None for row in pickle.loads(pickle.dumps(cache)))


def test_rows_that_are_not_scored_are_refused_or_left_out(copy: Path) -> None:
    record = sorted((copy / "targets" / f"top6-{TOP.hash8}").glob("part*.json"))[1]
    record.unlink()
    with pytest.raises(CacheError, match=r"has 3 rows in 1 parts that layer top6-\w+ has not scored; finish it"):
        opened(copy)
    cache = Cache.open(copy, targets="top6", allow_partial=True)
    assert len(cache) == len(cache.num_tokens) == 6
    assert [row.row_key for row in cache] == [
        sequence(r).row_key for r in plan_rows(0, 10) if r.line not in (5, 6, 7, 8)
    ]


def test_directory_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"is not a cache .*; build one with 'decant teach' or correct the path"):
        Cache.open(tmp_path / "nothing")
    assert "is not a cache" in next(verify_cache(tmp_path))


def test_identity_mismatch_is_refused_with_both_values_and_changes_nothing(copy: Path) -> None:
    before = tree(copy)
    with pytest.raises(IdentityError, match="vocab_size is 50 in this cache and 51 in the request"):
        CacheWriter.create_or_open(copy, dataclasses.replace(SEQUENCES, vocab_size=51), TOKENIZER)
    writer = CacheWriter.create_or_open(copy, SEQUENCES, TOKENIZER)
    with pytest.raises(
        IdentityError, match="cannot be scored by teacher: its tokenizer is other and the cache's tokenizer"
    ):
        LayerWriter.create_or_open(writer, None, dataclasses.replace(TOP, tokenizer_hash="other"), {})
    with pytest.raises(IdentityError, match=r"layer top6-\w+ of .* cannot be extended: k is 6 in this .* and 5 in the"):
        LayerWriter.create_or_open(writer, "top6", dataclasses.replace(TOP, k=5), {})
    assert tree(copy) == before


def test_layer_of_the_same_identity_is_continued_whatever_its_provenance(copy: Path) -> None:
    writer = CacheWriter.create_or_open(copy, SEQUENCES, {})
    layer = LayerWriter.create_or_open(writer, None, dataclasses.replace(TOP, teacher="moved"), {"machine": "another"})
    assert layer.name == f"top6-{TOP.hash8}"
    assert layer.missing() == []
    with pytest.raises(CacheError, match="holds this capture as layer top6-"):
        LayerWriter.create_or_open(writer, "mine", TOP, {})
    for name in ("../x", "a/b", "Top", "", "a" * 80):
        with pytest.raises(CacheError, match="cannot name a layer"):
            LayerWriter.create_or_open(writer, name, dataclasses.replace(TOP, k=2), {})


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b/c", ".hidden", "a\x00b", ""])
def test_tokenizer_files_stay_inside_the_cache(copy: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="whose name a cache cannot hold"):
        CacheWriter.create_or_open(tmp_path / "new", SEQUENCES, {name: b"x"})
    assert not (tmp_path / "new").exists()
    edit(copy / "cache.json", lambda header: header["tokenizer_files"].update({name: {"bytes": 1, "xxh3": "0" * 32}}))
    with pytest.raises(DamagedError, match="not the name of a tokenizer file"):
        opened(copy)


def test_altered_layer_identity_is_refused(copy: Path) -> None:
    layer = copy / "targets" / f"top6-{TOP.hash8}" / "layer.json"
    edit(layer, lambda document: document["identity"].update(k=64))
    with pytest.raises(DamagedError, match="hashes to"):
        opened(copy)


def test_writer_refuses_rows_and_targets_that_do_not_fit(copy: Path) -> None:
    writer = CacheWriter.create_or_open(copy, SEQUENCES, TOKENIZER)
    rows = [sequence(row) for row in plan_rows(20, 23)]
    outside = dataclasses.replace(
        rows[1], token_ids=np.where(np.arange(len(rows[1].token_ids)) == 2, VOCAB, rows[1].token_ids)
    )
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        writer.write_sequences("part-0123abcd-000000", [rows[0], outside], SOFTWARE)
    overlapping = dataclasses.replace(rows[1], spans=np.array([[1, 4], [3, 5]], np.int32))
    with pytest.raises(ValueError, match="without overlap"):
        writer.write_sequences("part-0123abcd-000000", [overlapping], SOFTWARE)
    record = writer.write_sequences("part-0123abcd-000000", rows, SOFTWARE)
    layer = LayerWriter.create_or_open(writer, None, TOP, {})
    assert [missing.stem for missing in layer.missing()] == [record.stem]
    targets = [targets_of(row, TOP) for row in rows]
    keys = [row.key for row in rows]
    for wrong in ((keys[::-1], targets), (keys[:2], targets[:2]), (keys, targets[:2])):
        with pytest.raises(ValueError):
            layer.write(record.stem, wrong[0], wrong[1], SOFTWARE)
    with pytest.raises(ValueError, match="positions"):
        layer.write(record.stem, keys, [targets[0]] * 3, SOFTWARE)
    with pytest.raises(ValueError, match="not a committed sequences part"):
        layer.write("part-0123abcd-000001", keys, targets, SOFTWARE)
    layer.write(record.stem, keys, targets, SOFTWARE)
    assert list(verify_cache(copy)) == []


def test_committed_keys_are_those_of_the_rows(copy: Path) -> None:
    writer = CacheWriter.create_or_open(copy, SEQUENCES, TOKENIZER)
    keys = committed_keys(sequences_dir(copy), writer.sequence_records())
    assert {key.tobytes() for key in keys} == {row.row_key for row in plan_rows(0, 10) if row.line % 7}


def test_statistics_are_those_of_the_rows(path: Path) -> None:
    cache = opened(path)
    figures = cache.stats()
    targets = [targets_of(row, TOP) for row in cache]
    positions = sum(row.num_positions for row in targets)
    entropies = np.concatenate([position_entropy_nats(row) for row in targets])
    counts = np.concatenate([row.counts for row in targets])
    assert figures["rows"] == 9
    assert figures["positions"] == positions
    assert figures["tokens"] == cache.num_tokens.sum()
    assert figures["set_aside"] == {"too long": 1}
    assert figures["mean_support"] == pytest.approx(counts.mean())
    assert figures["mean_entropy_nats"] == pytest.approx(entropies.mean())
    histogram = np.histogram(entropies, bins=np.arange(65) * figures["entropy_bin_nats"])[0]
    assert figures["entropy_histogram"] == histogram.tolist()
    assert figures["support_histogram"][1:4] == [
        (counts == 1).sum(),
        ((counts > 1) & (counts < 4)).sum(),
        (counts >= 4).sum(),
    ]
    assert {name: source["rows"] for name, source in figures["sources"].items()} == {"code": 5, "math": 4}
    files = list((path / "targets" / f"top6-{TOP.hash8}").glob("*.arrow"))
    assert figures["bytes_per_position"] == pytest.approx(sum(file.stat().st_size for file in files) / positions)


def test_entropy_counts_the_tail_as_one_bucket() -> None:
    targets = targets_of(sequence(next(plan_rows(0, 1))), TOP)
    offsets = targets.offsets()
    for s, got in enumerate(position_entropy_nats(targets)):
        masses = [
            *np.exp(targets.logprobs[offsets[s] : offsets[s + 1]].astype(float)),
            np.exp(float(targets.tail_logmass[s, 0])),
        ]
        assert got == pytest.approx(-sum(p * np.log(p) for p in masses))


def test_pickled_cache_reads_the_same_rows_after_the_cache_has_grown(copy: Path) -> None:
    cache = opened(copy)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2000
    build(copy, 20, 26, layers=(TOP, HYBRID))
    again = pickle.loads(pickled)
    assert len(opened(copy)) > len(again) == 9
    assert again.cache_id == cache.cache_id != opened(copy).cache_id
    assert [row.key for row in again] == [row.key for row in cache]
    for part in (copy / "sequences").glob("*.json"):
        part.unlink()
    with pytest.raises(CacheError, match="lost parts"):
        pickle.loads(pickled)


def keys_in_child(cache: Cache) -> list[bytes]:
    return [cache[i].key for i in range(len(cache))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_rows(path: Path, method: str) -> None:
    cache = opened(path)
    keys = keys_in_child(cache)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(keys_in_child, (cache,)).get(60) == keys


def test_forked_child_does_not_wait_for_its_parents_threads(path: Path) -> None:
    cache = opened(path)
    expected = cache[0].key
    cache._sequences._parts = {}
    with cache._sequences._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if cache[0].key == expected else 1)
        deadline = time.monotonic() + 30
        status = None
        while status is None and time.monotonic() < deadline:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.01)
        if status is None:
            os.kill(child, 9)
    assert status == 0


def test_threads_share_a_cache_with_few_open_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.parts.open_parts.MOST_OPEN_PARTS", 1)
    cache = opened(path)
    keys = [row.key for row in cache]
    order = np.random.default_rng(0).integers(0, len(cache), 400)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: cache[i].key, order)) == [keys[i] for i in order]
    assert len(cache._sequences._parts) == 1


def test_cache_id_changes_with_the_data_and_with_nothing_else(path: Path, copy: Path) -> None:
    assert opened(copy).cache_id == opened(path).cache_id != Cache.open(copy, targets="top3-sample4").cache_id
    build(copy, 20, 22, layers=(TOP, HYBRID))
    assert opened(copy).cache_id != opened(path).cache_id


def test_verify_at_opening_finds_damage_before_the_first_row(copy: Path) -> None:
    part = sorted((copy / "targets" / f"top6-{TOP.hash8}").glob("*.arrow"))[-1]
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    Cache.open(copy, targets="top6")
    with pytest.raises(DamagedError, match=f"{part.name} has .* with checksum"):
        Cache.open(copy, targets="top6", verify=True)


def test_verify_names_every_damaged_file(copy: Path) -> None:
    assert list(verify_cache(copy)) == []
    (copy / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    part = sorted((copy / "sequences").glob("*.arrow"))[0]
    part.write_bytes(part.read_bytes()[:-3])
    orphan = copy / "targets" / f"top6-{TOP.hash8}"
    sorted((copy / "sequences").glob("*.json"))[2].unlink()
    problems = list(verify_cache(copy))
    assert any("tokenizer.json was altered" in problem for problem in problems)
    assert any(part.name in problem and "truncated or altered" in problem for problem in problems)
    assert any(str(orphan) in problem and "does not exist" in problem for problem in problems)


def test_verify_finds_targets_that_are_well_formed_but_of_other_content(copy: Path) -> None:
    from shared.parts.parts import commit_part, open_part
    from shared.parts.records import list_records

    layer = copy / "targets" / f"top6-{TOP.hash8}"
    record = list_records(layer)[0]
    table = open_part(layer, record, verify=True)
    for ending in (".arrow", ".json"):
        (layer / f"{record.stem}{ending}").unlink()
    blobs = table.column("blob").to_pylist()
    swapped = pa.array([blobs[1], blobs[0], *blobs[2:]], table.schema.field("blob").type)
    commit_part(layer, record.stem, table.set_column(3, "blob", swapped).cast(table.schema), record.stats, {}, [])
    problems = list(verify_cache(copy))
    assert len(problems) == 2
    assert all(f"{record.stem}.arrow:{i}: " in problem for i, problem in enumerate(problems))


def test_garbage_is_what_killed_writers_left_and_only_when_old(copy: Path) -> None:
    before = tree(copy)
    layer = copy / "targets" / f"top6-{TOP.hash8}"
    left = [
        copy / ".cache.json.tmp-1-abc",
        copy / "sequences" / ".part-0123abcd-000000.arrow.tmp-1-abc",
        copy / "sequences" / "part-0123abcd-000000.arrow",
        copy / "tokenizer" / ".tokenizer.json.tmp-1-abc",
        layer / "part-0123abcd-000000.arrow",
        next((copy / "jobs").iterdir()) / ".plan.arrow.tmp-1-abc",
    ]
    for file in left:
        file.write_bytes(b"x")
    assert collect_garbage(copy, dry_run=False) == []
    for file in left:
        os.utime(file, (1, 1))
    assert collect_garbage(copy, dry_run=True) == sorted(left)
    assert all(file.exists() for file in left)
    assert collect_garbage(copy, dry_run=False) == sorted(left)
    assert tree(copy) == before
    with pytest.raises(CacheError, match="is not a cache"):
        collect_garbage(copy / "sequences", dry_run=False)


def test_a_layer_without_a_part_goes_when_old_and_its_writer_makes_it_again(copy: Path) -> None:
    writer = CacheWriter.create_or_open(copy, SEQUENCES, TOKENIZER)
    lazy = LayerWriter.create_or_open(writer, "lazy", dataclasses.replace(TOP, k=2), {}, make=False)
    assert not lazy.directory.exists()
    empty = LayerWriter.create_or_open(writer, "empty", dataclasses.replace(TOP, k=4), {})
    before = tree(copy)
    assert collect_garbage(copy, dry_run=False) == []
    os.utime(empty.directory / "layer.json", (1, 1))
    assert collect_garbage(copy, dry_run=True) == [empty.directory / "layer.json"]
    assert tree(copy) == before
    assert collect_garbage(copy, dry_run=False) == [empty.directory / "layer.json"]
    assert not empty.directory.exists()
    for layer, name in ((lazy, "lazy"), (empty, "empty")):
        score(layer)
        assert len(Cache.open(copy, name)) == len(Cache.open_sequences(copy))
        os.utime(layer.directory / "layer.json", (1, 1))
    assert collect_garbage(copy, dry_run=False) == []
    assert list(verify_cache(copy)) == []


def test_creation_that_was_killed_before_the_tokenizer_is_completed_or_refused(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    file.unlink()
    with pytest.raises(IdentityError, match=r"tokenizer\.json is missing"):
        CacheWriter.create_or_open(copy, SEQUENCES, {"tokenizer.json": b"another"})
    CacheWriter.create_or_open(copy, SEQUENCES, TOKENIZER)
    assert file.read_bytes() == TOKENIZER["tokenizer.json"]

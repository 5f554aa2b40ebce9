"""Hidden layers: quantised within stated bounds, bytes come back exactly, what was not written is refused, parts are
committed.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.garbage import collect_garbage
from shared.cache.writing.layer_writer import HiddenWriter
from shared.errors import CacheError, DamagedError, IdentityError, UsageError
from shared.identity.hidden_identity import FINAL, HiddenIdentity
from shared.identity.hidden_layers import numbered, spread_evenly
from shared.payload.hidden import MASS_UNIT, Attention, HiddenStates, Vectors
from shared.payload.hidden_codec import HiddenCodec
from shared.payload.projection import projection_matrix
from tests.shared.altered import edit
from tests.shared.small_cache import build, tree

STATES = HiddenIdentity(
    teacher="teacher",
    weights_hash="weights",
    tokenizer_hash="tokenizer",
    num_layers=4,
    width=9,
    layers=(2, FINAL),
    pooled="mean",
    attention_layers=(3,),
    strongest=3,
)


def random_hidden(rng: np.random.Generator, codec: HiddenCodec, num_positions: int) -> HiddenStates:
    states = rng.normal(size=(codec.num_layers, num_positions, codec.width)) * 10.0 ** rng.integers(-3, 4)
    attention = []
    for _ in range(codec.num_attention_layers):
        masses = -np.sort(-rng.dirichlet(np.full(codec.strongest + 2, 0.3), num_positions), axis=1)[
            :, : codec.strongest
        ]
        distances = np.argsort(rng.random((num_positions, codec.strongest + 5)), axis=1)[:, : codec.strongest]
        attention.append(Attention.quantise(distances, masses))
    pooled = Vectors.quantise(rng.normal(size=codec.width)) if codec.has_pooled else None
    return HiddenStates(Vectors.quantise(states), pooled, tuple(attention))


@st.composite
def rows(draw: st.DrawFn) -> tuple[HiddenCodec, HiddenStates]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    attention = draw(st.sampled_from([0, 1, 3]))
    strongest = draw(st.sampled_from([1, 2, 40])) if attention else 0
    codec = HiddenCodec(draw(st.integers(0, 3)), draw(st.integers(1, 17)), draw(st.booleans()), attention, strongest)
    return codec, random_hidden(rng, codec, draw(st.integers(0, 6)))


def equal(a: HiddenStates, b: HiddenStates) -> bool:
    pairs = [(a.states.values, b.states.values), (a.states.scales, b.states.scales)]
    assert (a.pooled is None) == (b.pooled is None)
    if a.pooled is not None:
        pairs += [(a.pooled.values, b.pooled.values), (a.pooled.scales, b.pooled.scales)]
    for x, y in zip(a.attention, b.attention, strict=True):
        pairs += [(x.counts, y.counts), (x.distances, y.distances), (x.mass_codes, y.mass_codes)]
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@settings(max_examples=80, deadline=None)
@given(rows())
def test_row_comes_back_exactly(case: tuple[HiddenCodec, HiddenStates]) -> None:
    codec, hidden = case
    assert equal(pickle.loads(pickle.dumps(codec)).decode(codec.encode(hidden), hidden.num_positions), hidden)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-35, 1e-6, 1.0, 1e4, 1e30]), st.integers(1, 40))
def test_coordinates_are_within_half_a_step(seed: int, size: float, width: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(5, width)) * size
    vectors[0] = 0.0
    found = Vectors.quantise(vectors.astype(np.float32))
    absmax = np.abs(vectors).max(axis=1, keepdims=True)
    error = np.abs(found.dense().astype(np.float64) - vectors)
    assert (error <= absmax / 254 * (1 + 1e-4) + 1e-30).all()


def test_gaussian_states_lose_less_than_a_hundredth_of_their_length() -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 512))
    error = np.linalg.norm(Vectors.quantise(vectors).dense() - vectors, axis=1) / np.linalg.norm(vectors, axis=1)
    assert 0.004 < error.mean() < 0.01  # docs/format.md states 0.007


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_attention_sums_to_one_and_is_within_a_step(seed: int, strongest: int) -> None:
    rng = np.random.default_rng(seed)
    masses = -np.sort(-rng.dirichlet(np.full(strongest + 1, 0.2), 8), axis=1)[:, :strongest].astype(np.float32)
    distances = np.tile(np.arange(strongest), (8, 1))
    kept = Attention.quantise(distances, masses)
    dense = np.zeros_like(masses, dtype=np.float64)
    query = np.repeat(np.arange(8), kept.counts)
    dense[query, kept.distances] = kept.mass_codes / MASS_UNIT
    assert ((masses - dense >= -1e-6) & (masses - dense < 1 / MASS_UNIT + 1e-6)).all()
    assert (kept.rest_codes >= 0).all()
    np.testing.assert_array_equal(np.bincount(query, kept.mass_codes, 8) + kept.rest_codes, MASS_UNIT)


@settings(max_examples=80, deadline=None)
@given(rows(), st.data())
def test_altered_blob_is_refused_or_still_a_valid_row(
    case: tuple[HiddenCodec, HiddenStates], data: st.DataObject
) -> None:
    codec, hidden = case
    blob = bytearray(codec.encode(hidden))
    place = data.draw(st.integers(0, len(blob) - 1))
    blob[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        after = codec.decode(bytes(blob), hidden.num_positions)
    except DamagedError:
        return
    assert equal(after, hidden)


@settings(max_examples=60, deadline=None)
@given(rows(), st.data())
def test_altered_content_never_breaks_the_rules_of_a_row(
    case: tuple[HiddenCodec, HiddenStates], data: st.DataObject
) -> None:
    codec, hidden = case
    content = bytearray(zstandard.ZstdDecompressor().decompress(codec.encode(hidden)))
    if not content:
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    blob = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(content))
    try:
        after = codec.decode(blob, hidden.num_positions)
    except DamagedError:
        return
    assert all((one.rest_codes >= 0).all() and one.counts.max(initial=0) <= codec.strongest for one in after.attention)
    assert np.isfinite(after.states.dense()).all()
    assert equal(codec.decode(codec.encode(after), hidden.num_positions), after)


@pytest.mark.parametrize(
    ("blob", "positions"),
    [
        (zstandard.ZstdCompressor(write_checksum=True).compress(b"\0" * 2**20), 2),
        (zstandard.ZstdCompressor(write_checksum=False).compress(b"\0" * 26), 2),
        (b"not a frame", 2),
        (b"", 2),
        (zstandard.ZstdCompressor(write_checksum=True).compress(b"\0" * 3), 2),
        (zstandard.ZstdCompressor(write_checksum=True).compress(b""), 2**31),
    ],
)
def test_what_is_no_row_is_refused_before_anything_is_allocated(blob: bytes, positions: int) -> None:
    with pytest.raises(DamagedError):
        HiddenCodec(1, 9).decode(blob, positions)


def test_row_that_would_be_too_large_is_refused_with_what_to_do() -> None:
    with pytest.raises(DamagedError, match="capture fewer layers"):
        HiddenCodec(1024, 8192).max_content_bytes(2**18)


def test_states_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Vectors.quantise(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="add up to more than 1"):
        Attention.quantise(np.zeros((1, 2)), np.array([[0.9, 0.8]]))


def test_projection_is_a_pure_function_that_keeps_lengths() -> None:
    matrix = projection_matrix(300, 128, seed=5)
    np.testing.assert_array_equal(matrix, projection_matrix(300, 128, seed=5))
    assert not np.array_equal(matrix, projection_matrix(300, 128, seed=6))
    vectors = np.random.default_rng(0).normal(size=(200, 300))
    ratio = np.linalg.norm(vectors @ matrix, axis=1) / np.linalg.norm(vectors, axis=1)
    assert abs(float((ratio**2).mean()) - 1) < 0.05
    assert float(ratio.std()) == pytest.approx(1 / np.sqrt(2 * 128), rel=0.25)
    assert matrix[0, :2].tolist() == pytest.approx(
        FIRST_ENTRIES, abs=1e-7
    )  # another generator would make stored layers useless


FIRST_ENTRIES = [-0.05860186740756035, -0.14686468243598938]


def test_layers_are_spread_with_the_last_among_them() -> None:
    assert spread_evenly(3, 24) == (8, 16, 24)
    assert spread_evenly(5, 5) == (1, 2, 3, 4, 5)
    assert spread_evenly(1, 7) == (7,)
    assert numbered(["final", 3, 1], 4, "layers") == (1, 3, FINAL)
    with pytest.raises(UsageError, match="names layer 5 of a teacher that has 4"):
        numbered([5], 4, "capture.hidden.layers")
    with pytest.raises(UsageError, match="asks for 5 layers"):
        numbered(5, 4, "capture.hidden.layers")


def add_hidden(path: Path, identity: HiddenIdentity = STATES, rows_per_part: int = 4, **how: Any) -> HiddenWriter:
    """Add a hidden layer to the small cache: a pure function of each row's key."""
    cache = build(path, rows_per_part=rows_per_part, **how)
    writer = HiddenWriter.create_or_open(cache, None, identity, {"machine": "test"})
    codec = identity.make_codec()
    for record in writer.missing():
        rows = writer.cache.read_sequences(record)
        hidden = [random_hidden(np.random.default_rng(list(row.key)), codec, row.num_positions) for row in rows]
        writer.write(record.stem, [row.key for row in rows], hidden, {"decant": "test"})
    return writer


@pytest.fixture
def cache_path(tmp_path: Path) -> Path:
    add_hidden(tmp_path / "cache")
    return tmp_path / "cache"


def check_rows(cache: Cache) -> None:
    for row in cache:
        expected = random_hidden(np.random.default_rng(list(row.key)), STATES.make_codec(), row.num_positions)
        assert equal(row.hidden, expected)
        assert row.targets is not None


def test_rows_come_with_their_hidden_states_by_key(cache_path: Path) -> None:
    cache = Cache.open(cache_path, hidden=True, verify=True)
    assert (cache.hidden_layer, cache.hidden_name) == (STATES, f"layers2-mean-attention1-{STATES.hash8}")
    check_rows(cache)
    check_rows(Cache.open(cache_path, hidden="layers2-mean-attention1"))
    check_rows(pickle.loads(pickle.dumps(cache)))
    assert cache.stats()["hidden_bytes_per_position"] > 0
    assert list(verify_cache(cache_path)) == []


def test_cache_without_hidden_states_keeps_its_id_and_one_with_them_has_another(
    cache_path: Path, tmp_path: Path
) -> None:
    build(tmp_path / "plain")
    assert Cache.open(cache_path).cache_id == Cache.open(tmp_path / "plain").cache_id
    assert Cache.open(cache_path, hidden=True).cache_id != Cache.open(cache_path).cache_id
    assert Cache.open(cache_path)[0].hidden is None


def test_hidden_states_are_read_in_a_forked_process(cache_path: Path) -> None:
    cache = Cache.open(cache_path, hidden=True)
    check_rows(cache)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_digest, [(cache, index) for index in range(len(cache))])
    assert found == [_digest((cache, index)) for index in range(len(cache))]


def _digest(task: tuple[Cache, int]) -> bytes:
    cache, index = task
    return cache[index].hidden.states.values.tobytes()


def test_missing_layer_or_part_is_said_in_a_sentence(cache_path: Path, tmp_path: Path) -> None:
    build(tmp_path / "plain")
    with pytest.raises(CacheError, match="has no hidden layer; add"):
        Cache.open(tmp_path / "plain", hidden=True)
    with pytest.raises(CacheError, match="no hidden layer named 'other'"):
        Cache.open(cache_path, hidden="other")
    directory = next((cache_path / "hidden").iterdir())
    next(directory.glob("part-*.json")).unlink()
    with pytest.raises(CacheError, match="lacks hidden states of"):
        Cache.open(cache_path, hidden=True)
    Cache.open(cache_path)
    orphan = next(path for path in directory.glob("part-*.arrow") if not path.with_suffix(".json").exists())
    assert collect_garbage(cache_path, dry_run=False, min_age_seconds=-60) == [orphan]


def test_altered_part_is_found_by_verify_and_by_the_row(cache_path: Path) -> None:
    part = sorted((cache_path / "hidden").rglob("part-*.arrow"))[0]
    data = bytearray(part.read_bytes())
    blob = Cache.open(cache_path, hidden=True)._hidden._parts.get(0).blob(0, Cache.open(cache_path)[0])
    place = bytes(data).index(bytes(blob)) + len(blob) - 2  # in the frame's checksum
    data[place] ^= 0xFF
    part.unlink()
    part.write_bytes(data)
    problems = list(verify_cache(cache_path))
    assert len(problems) == 1
    assert str(part) in problems[0]
    with pytest.raises(DamagedError, match="checksum"):
        Cache.open(cache_path, hidden=True, verify=True)
    with pytest.raises(DamagedError, match=part.name):
        Cache.open(cache_path, hidden=True)[0]


def test_altered_identity_and_another_tokenizer_are_refused(cache_path: Path) -> None:
    path = next((cache_path / "hidden").iterdir()) / "layer.json"
    before = path.read_bytes()
    for change in ({"width": 10}, {"layers": "2"}, {"strongest": None}):
        edit(path, lambda document, change=change: document["identity"].update(change))
        with pytest.raises(DamagedError, match=r"hashes to|which does not fit"):
            Cache.open(cache_path, hidden=True)
        path.write_bytes(before)
    with pytest.raises(IdentityError, match="tokenizer"):
        add_hidden(cache_path, dataclasses.replace(STATES, tokenizer_hash="another"))


@pytest.mark.parametrize(
    "change", [{"width": 2**21}, {"layers": (5,)}, {"attention_layers": (0,)}, {"strongest": 10**6}]
)
def test_impossible_identity_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DamagedError, match="impossible"):
        dataclasses.replace(STATES, **change).make_codec()


def test_same_identity_under_another_path_is_the_same_layer(cache_path: Path) -> None:
    before = tree(cache_path)
    add_hidden(cache_path, dataclasses.replace(STATES, teacher="elsewhere"))
    assert tree(cache_path) == before


def test_writer_refuses_rows_of_another_part(cache_path: Path) -> None:
    writer = add_hidden(cache_path, dataclasses.replace(STATES, strongest=4))
    record = writer.cache.sequence_records()[0]
    rows = writer.cache.read_sequences(record)
    hidden = [random_hidden(np.random.default_rng(0), writer.identity.make_codec(), row.num_positions) for row in rows]
    with pytest.raises(ValueError, match="not those of its"):
        writer.write(record.stem, [rows[0].key] * len(rows), hidden, {})


@pytest.mark.parametrize("place", ["hidden.before_fsync", "hidden.after_rename@2", "hidden_record.before_rename"])
def test_killed_writer_is_continued_to_the_same_bytes(tmp_path: Path, place: str) -> None:
    add_hidden(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "hidden")
    child = os.fork()
    if child == 0:
        os.environ["DECANT_FAILPOINT"] = place
        add_hidden(tmp_path / "killed")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert list(verify_cache(tmp_path / "killed")) == []
    add_hidden(tmp_path / "killed")
    collect_garbage(tmp_path / "killed", dry_run=False, min_age_seconds=-60)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")

"""Codec: what was encoded comes back within the stated bounds; what was not written by it is refused."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DamagedError, UsageError
from shared.payload import row_batches
from shared.payload.codec import Codec
from shared.payload.targets import Draws, SparseTargets
from shared.payload.targets_at import head_logprobs_at
from tests.shared.dense_targets import Dense, cut, equal_targets, log_softmax

LARGEST_ID = 2**24 - 1


@st.composite
def rows(draw: st.DrawFn) -> tuple[Codec, Dense, np.ndarray]:
    """A codec, a row that fits it, and the token ids of its vocabulary's entries."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.integers(1, 60))
    most = draw(st.sampled_from([0, 1, 3, vocab]))
    num_positions = draw(st.integers(0, 7))
    ragged = draw(st.booleans())
    most = min(most, vocab)
    counts = rng.integers(0, most + 1, num_positions) if ragged else np.full(num_positions, most)
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 4.0)]))
    draws = draw(st.sampled_from([0, 1, 5, 300]))
    names = np.unique(np.concatenate([rng.integers(0, LARGEST_ID, vocab * 3), [LARGEST_ID]]))[-vocab:]
    step = draw(st.sampled_from([1 / 8, 1 / 16, 1 / 32, 0.1, 2**-10]))
    return Codec(step, temperatures, draws), cut(rng, num_positions, vocab, counts, temperatures, draws, names), names


@settings(max_examples=40, deadline=None)
@given(rows(), st.integers(0, 2**32), st.sampled_from([1, 20, 10**6]))
def test_rows_encoded_together_are_those_encoded_alone(
    case: tuple[Codec, Dense, np.ndarray], seed: int, entries: int
) -> None:
    codec, dense, names = case
    rng, draws = np.random.default_rng(seed), len(dense.targets.draws) and codec.draws
    several = [dense.targets]
    for num_positions in rng.integers(0, 6, 4):
        counts = rng.integers(0, len(names) + 1, num_positions)
        several.append(cut(rng, int(num_positions), len(names), counts, codec.temperatures, draws, names).targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_batches, "BATCH_ENTRIES", entries)
        assert codec.encode_rows(several) == [codec.encode(row) for row in several]


@settings(max_examples=150, deadline=None)
@given(rows())
def test_decoded_row_is_within_every_stated_bound(case: tuple[Codec, Dense, np.ndarray]) -> None:
    codec, dense, _ = case
    before = dense.targets
    after = codec.decode(codec.encode(before), before.num_positions)
    assert np.array_equal(after.counts, before.counts)
    assert np.array_equal(after.ids, before.ids)
    assert [a.dtype for a in (after.logprobs, after.label_logprobs, after.tail_logmass)] == [np.float32] * 3
    assert np.abs(after.label_logprobs - before.label_logprobs).max(initial=0) <= 1 / 1024 + 1e-5
    for x, y in zip(after.draws, before.draws, strict=True):
        assert np.array_equal(x.counts, y.counts)
        assert np.array_equal(x.ids, y.ids)
        assert np.array_equal(x.multiplicities, y.multiplicities)
    offsets = before.offsets()
    for s in range(before.num_positions):
        old = before.logprobs[offsets[s] : offsets[s + 1]].astype(np.float64)
        new = after.logprobs[offsets[s] : offsets[s + 1]].astype(np.float64)
        if len(old):
            assert np.abs((old - old[0]) - (new - new[0])).max() <= codec.gap_step / 2 + 1e-5
        for j in range(len(codec.temperatures)):
            a, b = float(before.tail_logmass[s, j]), float(after.tail_logmass[s, j])
            if a in (0.0, -np.inf):
                assert a == b
            else:
                log_odds = np.clip([m - np.log(-np.expm1(m)) for m in (a, b)], -32.0, 32.0)
                assert abs(log_odds[0] - log_odds[1]) <= 1 / 2048 + 1e-3
        total = np.exp(new).sum() + np.exp(float(after.tail_logmass[s, codec.temperatures.index(1.0)]))
        assert abs(total - 1) < 1e-6


@settings(max_examples=60, deadline=None)
@given(rows())
def test_head_at_every_captured_temperature_is_that_of_the_dense_softmax(case: tuple[Codec, Dense, np.ndarray]) -> None:
    codec, dense, names = case
    targets = dense.targets
    positions = np.repeat(np.arange(targets.num_positions), targets.counts)
    columns = np.searchsorted(names, targets.ids)
    decoded = codec.decode(codec.encode(targets), targets.num_positions)
    for temperature in codec.temperatures:
        truth = log_softmax(dense.logits / temperature)[positions, columns]
        assert np.abs(head_logprobs_at(targets, temperature) - truth).max(initial=0) < 2e-3
        # decoded: distances are within step / 2 at T = 1, so within step / 2T at T, and the level within as much again
        bound = codec.gap_step / temperature + 1 / 1024 + 2e-3
        assert np.abs(head_logprobs_at(decoded, temperature) - truth).max(initial=0) < bound


def test_errors_do_not_add_up_over_a_long_head() -> None:
    logprobs = -np.arange(1000) * np.float32(0.0999)
    logprobs = (logprobs - np.log(np.exp(logprobs).sum())).astype(np.float32)
    targets = one_position(np.arange(1000), logprobs, -np.inf)
    decoded = Codec(1 / 16).decode(Codec(1 / 16).encode(targets), 1)
    assert np.abs((decoded.logprobs - decoded.logprobs[0]) - (logprobs - logprobs[0])).max() <= 1 / 32 + 1e-4


def one_position(ids: np.ndarray, logprobs: np.ndarray, tail: float, label: float = -1.0) -> SparseTargets:
    return SparseTargets(
        np.array([len(ids)], np.int32),
        np.asarray(ids, np.int32),
        np.asarray(logprobs, np.float32),
        np.array([label], np.float32),
        np.array([[tail]], np.float32),
    )


@pytest.mark.parametrize("label", [-np.inf, -127.5, 0.0, -1e-4])
def test_extreme_labels_come_back(label: float) -> None:
    codec = Codec(1 / 16)
    decoded = codec.decode(codec.encode(one_position([5], [0.0], -np.inf, label)), 1)
    assert decoded.label_logprobs[0] == pytest.approx(label, abs=1 / 1024)


def test_label_far_below_the_range_is_stored_as_its_end() -> None:
    codec = Codec(1 / 16)
    decoded = codec.decode(codec.encode(one_position([5], [0.0], -np.inf, -500.0)), 1)
    assert decoded.label_logprobs[0] == pytest.approx(-65534 / 512)


@pytest.mark.parametrize("tail", [-60.0, -1e-7])
def test_masses_near_zero_and_one_stay_on_their_side(tail: float) -> None:
    codec = Codec(1 / 16)
    decoded = codec.decode(codec.encode(one_position([5], [np.log(-np.expm1(tail))], tail)), 1)
    assert np.isfinite(decoded.tail_logmass).all()
    assert np.isfinite(decoded.logprobs).all()
    assert np.exp(decoded.tail_logmass[0, 0].astype(np.float64)) == pytest.approx(np.exp(tail), abs=1e-9)


def good_row(draws: int = 2) -> tuple[Codec, SparseTargets]:
    rng = np.random.default_rng(1)
    codec = Codec(1 / 16, (1.0, 2.0), draws, vocab_size=40, max_k=6)
    return codec, cut(rng, 9, 40, np.full(9, 6), (1.0, 2.0), draws).targets


def with_changes(targets: SparseTargets, **changes: object) -> SparseTargets:
    return dataclasses.replace(targets, **changes)


def bad_rows() -> dict[str, SparseTargets]:
    _, good = good_row()
    twice, unsorted, outside, infinite = good.ids.copy(), good.logprobs.copy(), good.ids.copy(), good.logprobs.copy()
    twice[1] = twice[0]
    unsorted[:2] = unsorted[1::-1]
    outside[3] = 40
    infinite[5] = -np.inf
    drawn = good.draws[0]
    in_head, falling, extra = drawn.ids.copy(), drawn.ids.copy(), drawn.multiplicities.copy()
    in_head[0] = good.ids[0]
    first_two = int(np.flatnonzero(drawn.counts > 1)[0])
    at = int(drawn.counts[:first_two].sum())
    falling[at : at + 2] = falling[at : at + 2][::-1]
    extra[0] += 1
    other = good.draws[1]
    return {
        "repeated id": with_changes(good, ids=twice),
        "rising log-probability": with_changes(good, logprobs=unsorted),
        "id outside the vocabulary": with_changes(good, ids=outside),
        "infinite head entry": with_changes(good, logprobs=infinite),
        "positive label": with_changes(good, label_logprobs=np.full(9, 0.5, np.float32)),
        "label that is not a number": with_changes(good, label_logprobs=np.full(9, np.nan, np.float32)),
        "head and tail that do not sum to 1": with_changes(good, tail_logmass=good.tail_logmass - 1),
        "tail that is not a number": with_changes(good, tail_logmass=good.tail_logmass * np.nan),
        "counts that do not add up": with_changes(good, counts=good.counts + 1),
        "larger head than k": with_changes(good, counts=np.array([9, 3, *good.counts[2:]], np.int32)),
        "other temperatures": with_changes(good, temperatures=(1.0, 3.0)),
        "no draws": with_changes(good, draws=()),
        "drawn token in the head": with_changes(
            good, draws=(Draws(drawn.counts, in_head, drawn.multiplicities), other)
        ),
        "falling drawn ids": with_changes(good, draws=(Draws(drawn.counts, falling, drawn.multiplicities), other)),
        "too many draws": with_changes(good, draws=(Draws(drawn.counts, drawn.ids, extra), other)),
    }


@pytest.mark.parametrize("name", bad_rows())
def test_encoder_refuses(name: str) -> None:
    codec, good = good_row()
    codec.encode(good)
    with pytest.raises(ValueError):
        codec.encode(bad_rows()[name])


def reframed(blob: bytes, change: object) -> bytes:
    content = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), np.uint8).copy()
    content = change(content)  # type: ignore[operator]
    return zstandard.ZstdCompressor(write_checksum=True).compress(bytes(content))


def test_decoder_refuses_well_formed_frames_with_impossible_content() -> None:
    codec, good = good_row(draws=0)
    blob = codec.encode(good)
    num_positions, entries = 9, 54
    ids_low = 2 * num_positions
    gaps_low = ids_low + 3 * entries
    gaps = entries - num_positions
    tails = gaps_low + 2 * gaps + 2 * num_positions

    def put(value: int, *places: int) -> bytes:
        def change(content: np.ndarray) -> np.ndarray:
            content[list(places)] = value
            return content

        return reframed(blob, change)

    refused = {
        "names a token id twice": put(int(good.ids[0]), ids_low + 1),
        "outside the vocabulary": put(41, ids_low),
        "at most 6 are possible": put(200, 0),
        "are explained": put(5, 0),
        "are needed": reframed(blob, lambda content: content[:-1]),
        "beside a head": put(255, tails, tails + num_positions),
        "steps below its first": put(255, *range(gaps_low + gaps, gaps_low + gaps + 5)),
    }
    for text, frame in refused.items():
        with pytest.raises(DamagedError, match=text):
            codec.decode(frame, num_positions)


def test_frame_that_claims_more_than_the_row_can_hold_is_refused_before_allocation() -> None:
    codec, good = good_row(draws=0)
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(200_000_000))
    assert len(bomb) < 50_000
    with pytest.raises(DamagedError, match="claims 200000000 bytes where at most"):
        codec.decode(bomb, good.num_positions)


@pytest.mark.parametrize("num_positions", [0, 8, 10, 2**20, 2**40, -1])
def test_decoder_refuses_another_number_of_positions(num_positions: int) -> None:
    codec, good = good_row()
    with pytest.raises(DamagedError):
        codec.decode(codec.encode(good), num_positions)


def test_frames_without_checksum_or_size_are_refused() -> None:
    codec, good = good_row()
    content = zstandard.ZstdDecompressor().decompress(codec.encode(good))
    without_checksum = zstandard.ZstdCompressor(write_checksum=False).compress(content)
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    without_size = stream.compress(content) + stream.flush()
    for frame in (
        without_checksum,
        without_size,
        b"",
        b"\x28\xb5\x2f\xfd",
        codec.encode(good) + b"x",
        codec.encode(good) * 2,
    ):
        with pytest.raises(DamagedError):
            codec.decode(frame, good.num_positions)


def test_every_flipped_bit_of_a_blob_is_noticed() -> None:
    codec, good = good_row()
    blob = codec.encode(good)
    truth = codec.decode(blob, good.num_positions)
    for at in range(len(blob)):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << at % 8
        try:
            decoded = codec.decode(bytes(damaged), good.num_positions)
        except DamagedError:
            continue
        assert equal_targets(decoded, truth), f"byte {at}"


def test_codec_pickles_and_threads_share_it() -> None:
    codec, _ = good_row()
    copied = pickle.loads(pickle.dumps(codec))
    rng = np.random.default_rng(5)
    many = [cut(rng, 9, 40, np.full(9, 6), (1.0, 2.0), 2).targets for _ in range(40)]
    blobs = [codec.encode(targets) for targets in many]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copied.encode, many)) == blobs
        for targets, decoded in zip(many, pool.map(lambda blob: copied.decode(blob, 9), blobs), strict=True):
            assert np.array_equal(targets.ids, decoded.ids)


@pytest.mark.parametrize(
    "settings_",
    [
        {"gap_step": 0.0},
        {"gap_step": 2.0},
        {"temperatures": (2.0,)},
        {"temperatures": (2.0, 1.0)},
        {"draws": -1},
        {"vocab_size": 2**25},
    ],
)
def test_impossible_settings_are_refused(settings_: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Codec(**{"gap_step": 1 / 16, **settings_})  # type: ignore[arg-type]


@pytest.mark.parametrize("ragged", [False, True])
def test_gaps_that_overflow_are_refused(ragged: bool) -> None:
    codec = Codec(1 / 16, max_k=65_535)
    counts = np.array([65_535] + [1] * ragged, np.int32)
    ids = np.arange(65_535)
    planes = [counts & 255, counts >> 8]
    flat = np.concatenate([ids, np.zeros(int(ragged), int)])
    planes += [flat & 255, flat >> 8 & 255, flat >> 16]
    planes += [np.full(65_534, 255)] * 2
    planes += [np.full(len(counts), 128)] * 4
    content = np.concatenate(planes).astype(np.uint8).tobytes()
    with pytest.raises(DamagedError, match="steps below its first entry"):
        codec.decode(zstandard.ZstdCompressor(write_checksum=True).compress(content), len(counts))


def test_temperature_that_was_not_captured_is_refused_with_those_that_were() -> None:
    _, good = good_row()
    with pytest.raises(UsageError, match=r"temperature 3 was not captured \(captured: 1, 2\)"):
        head_logprobs_at(good, 3.0)

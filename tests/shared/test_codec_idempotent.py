"""Encoding decoded targets gives the bytes that they came from: every label and tail code, heads of every step."""

from __future__ import annotations

import numpy as np
import pytest

from shared.payload.codec import Codec
from shared.payload.quantise import TAIL_ALL, label_codes, label_table, tail_codes, tail_tables
from shared.payload.targets import SparseTargets
from tests.shared.dense_targets import cut, equal_targets

CODES = np.arange(65_536)


def test_every_label_code_comes_back() -> None:
    assert np.array_equal(label_codes(label_table()), CODES)


def test_every_tail_code_comes_back_through_float32() -> None:
    log_tail, _ = tail_tables()
    values = log_tail.astype(np.float32)[:, None]
    assert np.array_equal(tail_codes(values, CODES != TAIL_ALL)[:, 0], CODES)


@pytest.mark.parametrize("gap_step", [2.0**-10, 0.0137, 1 / 32, 0.0625, 0.3, 1.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_heads_of_any_step_and_depth_come_back(gap_step: float, ragged: bool) -> None:
    rng = np.random.default_rng(0)
    num_positions, k = 40, 48
    counts = rng.integers(1, k + 1, num_positions) if ragged else np.full(num_positions, k)
    codec = Codec(gap_step, (1.0, 2.0), vocab_size=1000, max_k=k)
    ids, logprobs, tails = [], [], []
    for count in counts:
        codes = np.sort(
            np.minimum(np.concatenate([[0], (10.0 ** rng.uniform(0, 4.9, count - 1)).astype(np.int64)]), 65_535)
        )
        tail = 10.0 ** rng.uniform(-13, -0.01)
        mass = np.exp(-codes * gap_step)
        logprobs.append(np.log1p(-tail) - np.log(mass.sum()) - codes * gap_step)
        ids.append(rng.permutation(1000)[:count])
        tails.append([np.log(tail), np.log(tail) / 2])
    targets = SparseTargets(
        counts.astype(np.int32),
        np.concatenate(ids).astype(np.int32),
        np.concatenate(logprobs).astype(np.float32),
        -rng.exponential(20, num_positions).astype(np.float32),
        np.asarray(tails, np.float32),
        (1.0, 2.0),
    )
    blob = codec.encode(targets)
    decoded = codec.decode(blob, num_positions)
    assert codec.encode(decoded) == blob
    assert equal_targets(codec.decode(codec.encode(decoded), num_positions), decoded)


@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize("counts", ["none", "all", "mixed"])
def test_draws_and_empty_and_full_supports_come_back(draws: int, counts: str) -> None:
    rng = np.random.default_rng(1)
    support = {"none": np.zeros(9, int), "all": np.full(9, 20), "mixed": rng.integers(1, 21, 9)}[counts]
    targets = cut(rng, 9, 20, support, (0.5, 1.0, 3.0), draws).targets
    codec = Codec(0.0625, (0.5, 1.0, 3.0), draws, 20, 20)
    blob = codec.encode(targets)
    assert codec.encode(codec.decode(blob, 9)) == blob

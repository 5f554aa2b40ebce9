"""A narrowed row is what a capture of its own would have stored: compared with one cut from the same dense
distributions.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.errors import CacheError
from shared.payload.codec import Codec
from shared.payload.narrowing import LayerView, Narrowing, narrow
from tests.shared.dense_targets import cut, equal_targets, log_softmax
from tests.shared.small_cache import TOP, build

TEMPERATURES = (1.0, 2.0, 4.0)
ROWS, VOCAB = 40, 60


def dense(count: int):
    counts = np.full(ROWS, count)
    counts[0] = 3
    return cut(np.random.default_rng(3), ROWS, VOCAB, counts, TEMPERATURES)


def test_cutting_a_head_gives_the_targets_of_the_smaller_capture():
    wide, small = dense(32), dense(8).targets
    found = narrow(wide.targets, Narrowing(8, 1.0, 4.0))
    for name in ("counts", "ids", "logprobs", "label_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(small, name))
    np.testing.assert_allclose(found.tail_logmass, small.tail_logmass, atol=1e-5)


def test_cutting_what_was_stored_stays_within_what_storing_costs():
    wide, small = dense(32).targets, dense(8).targets
    codec = Codec(0.0625, TEMPERATURES, 0, VOCAB, 32)
    found = narrow(codec.decode(codec.encode(wide), ROWS), Narrowing(8, 1.0, 4.0))
    np.testing.assert_array_equal(found.ids, small.ids)
    np.testing.assert_allclose(found.logprobs, small.logprobs, atol=0.07)
    np.testing.assert_allclose(found.tail_logmass, small.tail_logmass, atol=0.07)
    codec.encode(found)  # every position still sums to 1, or this refuses


def test_mass_is_reached_at_the_highest_temperature_of_the_request():
    wide = dense(32)
    found = narrow(wide.targets, Narrowing(20, 0.5, 2.0))
    p = np.sort(np.exp(log_softmax(wide.logits / 2.0)), axis=1)[:, ::-1]
    expected = np.minimum(1 + (p.cumsum(1) < 0.5).sum(1), 20)
    expected[0] = min(3, expected[0])
    np.testing.assert_array_equal(found.counts, expected)
    total = np.array(
        [np.exp(found.logprobs[a:b]).sum() for a, b in zip(found.offsets(), found.offsets()[1:], strict=False)]
    )
    np.testing.assert_allclose(total + np.exp(found.tail_logmass[:, 0]), 1.0, atol=1e-5)


def test_a_cache_reads_narrowed_rows_and_names_itself_so(tmp_path):
    build(tmp_path, layers=(TOP,))
    whole = Cache.open(tmp_path)
    view = LayerView("top6", Narrowing(2, 1.0, 2.0))
    cache = Cache.open(tmp_path, view)
    assert cache.layer == replace(TOP, k=2)
    assert cache.cache_id != whole.cache_id
    again = pickle.loads(pickle.dumps(cache))
    for i in range(len(cache)):
        assert equal_targets(cache[i].targets, narrow(whole[i].targets, view.narrowing))
        assert equal_targets(again[i].targets, cache[i].targets)
        assert cache[i].targets.counts.max() <= 2


@pytest.mark.parametrize("narrowing", [Narrowing(7, 1.0, 1.0), Narrowing(2, 1.0, 4.0)])
def test_more_than_a_layer_holds_is_refused(tmp_path, narrowing):
    build(tmp_path, layers=(TOP,))
    with pytest.raises(CacheError, match="does not hold what is asked for"):
        Cache.open(tmp_path, LayerView("top6", narrowing))

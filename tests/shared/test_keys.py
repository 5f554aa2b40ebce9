"""Keys: equal exactly where the question they answer has the same answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.writing.growing_key_set import GrowingKeySet
from shared.keys import KeySet, content_key, group_key, is_heldout, row_key, stack_keys


def test_row_key_tells_settings_samples_and_answers_apart() -> None:
    group = group_key("a prompt")
    keys = [
        row_key(group, {"temperature": 1.0, "top_p": 1.0}, 0, None),
        row_key(group, {"temperature": 1.0, "top_p": 1.0}, 1, None),
        row_key(group, {"temperature": 0.5, "top_p": 1.0}, 0, None),
        row_key(group_key("another"), {"temperature": 1.0, "top_p": 1.0}, 0, None),
        row_key(group, None, 0, "an answer"),
        row_key(group, None, 0, "another answer"),
        row_key(group, {}, 0, None),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)
    assert row_key(group, {"top_p": 1.0, "temperature": 1.0}, 0, None) == keys[0]


def test_row_key_wants_settings_or_an_answer() -> None:
    for sampling, answer in ((None, None), ({}, "answer")):
        with pytest.raises(ValueError):
            row_key(group_key("a"), sampling, 0, answer)


def test_content_key_separates_tokens_from_spans() -> None:
    def key(tokens: list[int], spans: list[int]) -> bytes:
        return content_key(np.array(tokens, np.int32), np.array(spans, np.int32).reshape(-1, 2))

    assert key([1, 2, 3, 4], [1, 2]) != key([1, 2, 3, 4, 1, 2], [])
    assert key([1, 2, 3], [1, 3]) != key([1, 2, 3], [2, 3])
    wide = np.array([1, 2], np.int64)
    assert content_key(wide, np.zeros((0, 2), np.int32)) == key([1, 2], [])  # type: ignore[arg-type]


def test_heldout_share_is_the_fraction_and_nested() -> None:
    groups = [group_key(f"prompt {i}") for i in range(4000)]
    small = {g for g in groups if is_heldout(g, 0.05)}
    large = {g for g in groups if is_heldout(g, 0.2)}
    assert small < large
    assert len(small) / 4000 == pytest.approx(0.05, abs=0.015)
    assert not any(is_heldout(g, 0.0) for g in groups)
    assert all(is_heldout(g, 1.0) for g in groups)


def test_keys_stay_what_they_are() -> None:
    assert group_key("prompt").hex() == "a82f608ca03bd143d521107664760aaf"
    assert row_key(group_key("prompt"), {"temperature": 1.0}, 3, None).hex() == "c8db30d7965fc744ea7e5c509075ec32"
    assert row_key(group_key("prompt"), None, 0, "answer").hex() == "a6682ac859d62b2a86d43ccb96e6c8c0"
    assert (
        content_key(np.arange(5, dtype=np.int32), np.array([[1, 5]], np.int32)).hex()
        == "9be5b2300c4a4bc8ad70e11a9f09b017"
    )


@given(
    st.lists(st.binary(min_size=16, max_size=16), max_size=40),
    st.lists(st.binary(min_size=16, max_size=16), max_size=10),
)
def test_key_set_contains_what_a_set_contains(members: list[bytes], others: list[bytes]) -> None:
    near = [key[:8] + bytes(8) for key in members]  # equal first halves, as no hash would give
    members = members + near[:2]
    asked = members + near + others
    expected = [key in set(members) for key in asked]
    assert KeySet(stack_keys(members)).contains(stack_keys(asked)).tolist() == expected


def test_growing_key_set_is_a_set_through_growth_and_collisions():
    rng = np.random.default_rng(0)
    keys = [rng.bytes(16) for _ in range(6000)]
    keys += [b"\x01" * 8 + i.to_bytes(8, "big") for i in range(1, 300)]  # all want one slot
    keys += [bytes(16), (2**12 - 1).to_bytes(8, "little") + bytes(8)]
    order = [*keys, *keys[::3]]
    rng.shuffle(order)
    found, expected = GrowingKeySet(), set()
    for key in order:
        assert found.add(key) == (key not in expected)
        expected.add(key)
    assert len(found) == len(expected)


def test_growing_key_set_refuses_other_lengths():
    with pytest.raises(ValueError, match="16 bytes"):
        GrowingKeySet().add(b"short")

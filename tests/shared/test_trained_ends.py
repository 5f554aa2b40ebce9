"""Which end tokens a cache's answers end with: those of whole answers."""

from __future__ import annotations

from pathlib import Path

from shared.cache.cache import Cache
from shared.cache.trained_ends import trained_ends
from tests.shared.small_cache import VOCAB, build


def test_an_answer_that_was_cut_by_length_ends_with_no_end_token(tmp_path: Path) -> None:
    """Even where the token that it was cut after is a special one: every student would stop there."""
    build(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    rows = [cache.sequence(number) for number in range(len(cache))]
    lasts = {
        reason: {int(row.token_ids[-1]) for row in rows if row.finish_reason == reason}
        for reason in ("stop", "length", "given")
    }
    earlier = {int(row.token_ids[row.spans[0, 1] - 1]) for row in rows}
    assert lasts["length"] - lasts["stop"] - lasts["given"] - earlier
    assert set(trained_ends(cache, range(VOCAB))) == lasts["stop"] | lasts["given"] | earlier
    only_cut = lasts["length"] - lasts["stop"] - lasts["given"] - earlier
    assert trained_ends(cache, only_cut) == ()

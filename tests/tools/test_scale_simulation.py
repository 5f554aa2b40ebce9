"""Simulated records are those of a cache that opens, with rows as counted."""

from __future__ import annotations

import json

from shared.cache.cache import Cache
from shared.parts.records import list_records
from tools.bench.scale_simulation import ROWS_PER_PART, make_records, measure


def test_simulated_cache_opens_and_is_measured(tmp_path, capsys):
    make_records(tmp_path / "cache", 3)
    cache = Cache.open(tmp_path / "cache")
    assert len(cache) == 3 * ROWS_PER_PART
    assert len(list_records(tmp_path / "cache" / "sequences")) == 3
    for what, items in (("names", 6 // 2), ("list_records", 3), ("open", len(cache))):
        measure(str(tmp_path / "cache"), what)
        assert json.loads(capsys.readouterr().out)["items"] == items

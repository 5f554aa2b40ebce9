"""The import command, and what a cache that it made has to hold."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shared.cache.cache import Cache
from tests.tools.foreign.peers import settings_of
from tools import cli

STEP = 0.0625
EXACT = settings_of(exact_k=12, polynomial_terms=None)


def run(capsys, *words, code=0):
    try:
        assert cli.main([str(word) for word in ("cache", "import", *words, "--json")]) == code
    except SystemExit as left:
        assert left.code == code
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

"""Seeded damage: one byte flipped in any file, and frames, Arrow files and headers that were altered at will."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.trials.flip_trials import run as flip
from tools.bench.trials.fuzz_trials import KINDS
from tools.bench.trials.fuzz_trials import run as fuzz

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden" / "format-1-sealed" / "cache"


@pytest.mark.slow
def test_no_flipped_byte_changes_in_silence_what_is_read_or_shown() -> None:
    result = flip(GOLDEN, 200, seed=1)
    assert result["silent"] == []
    assert sum(result["outcomes"].values()) == 200
    assert sum(count for name, count in result["outcomes"].items() if "refused" in name) > 150


@pytest.mark.slow
def test_a_byte_flipped_at_a_server_is_refused_by_its_url_and_not_kept() -> None:
    result = flip(GOLDEN, 15, seed=3, remote=True)
    assert result["silent"] == []
    assert {name.split(": ")[1] for name in result["outcomes"]} == {"refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_altered_bytes_are_read_or_refused_in_a_sentence(kind: str) -> None:
    result = fuzz(GOLDEN, 400, seed=2, kinds=(kind,))
    assert result["failures"] == []
    assert result["outcomes"][kind]["refused"] > 100

"""A figure of a plan, which is expected to be so much and is at most so much, and how it is written for people."""

from __future__ import annotations

from collections.abc import Mapping

from tools.cache.cache_commands import size

Bounds = Mapping[str, int]
BOUNDS = ("expected", "at_most")
NOTHING: Bounds = dict.fromkeys(BOUNDS, 0)
EXPECTED_SHARE_OF_MAX_NEW_TOKENS = 0.5
BYTES_PER_TOKEN_OF_SEQUENCES = 12.0
"""4 for the id, the rest for the texts."""


def span(count: Bounds) -> str:
    """Write an expectation and its bound, once where they agree."""
    if count["expected"] == count["at_most"]:
        return f"{count['expected']:,}"
    return f"{count['expected']:,} (at most {count['at_most']:,})"


def sizes(num_bytes: Bounds) -> str:
    """Write bytes: `sizes({"expected": 10, "at_most": 1500})` -> '10 B expected, 1.5 kB at most'."""
    return f"{size(num_bytes['expected'])} expected, {size(num_bytes['at_most'])} at most"

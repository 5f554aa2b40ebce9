"""Which files make up a cache, and in which order they may appear where a reader looks meanwhile.

What others refer to comes first: the tokenizer and plans, layers, their parts, the rows' parts, cache.json; so a reader
sees no row without its targets, and no cache before it is whole. Cost: one match per name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shared.schema import (
    JOB_PATTERN,
    LAYER_PATTERN,
    MAX_JSON_BYTES,
    MAX_TOKENIZER_FILE_BYTES,
    STEM_PATTERN,
    TOKENIZER_FILE_PATTERN,
)

_STEM, _LAYER = (re.sub(r"\?P<\w+>", "?:", pattern.pattern) for pattern in (STEM_PATTERN, LAYER_PATTERN))
_PART = rf"{_STEM}\.(?:json|arrow)"
_IN_ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        rf"tokenizer/{TOKENIZER_FILE_PATTERN.pattern}",
        rf"jobs/{JOB_PATTERN.pattern}/plan\.arrow",
        rf"(?:targets|hidden)/{_LAYER}/layer\.json",
        rf"(?:targets|hidden)/{_LAYER}/{_PART}",
        rf"sequences/{_PART}",
        r"cache\.json",
    )
)

_RANKS_OF_PARTS = (3, 4)


def rank_of(name: str) -> int | None:
    """Return a file's place in that order, by its path within the cache; None for what is no file of one.

    >>> [rank_of(name) for name in ("jobs/x", "sequences/part-0123abcd-000000.json", "cache.json", "../cache.json")]
    [None, 4, 5, None]
    """
    return next((rank for rank, pattern in enumerate(_IN_ORDER) if pattern.fullmatch(name)), None)


def is_part(name: str) -> bool:
    """Tell whether a file of a cache is a part's Arrow file, which its record describes."""
    return name.endswith(".arrow") and not name.startswith("jobs/")


def parts_in(names: Iterable[str]) -> set[str]:
    """Return those among files of a cache that are parts or their records.

    >>> sorted(parts_in(["cache.json", "sequences/part-0123abcd-000000.json"]))
    ['sequences/part-0123abcd-000000.json']
    """
    return {name for name in names if rank_of(name) in _RANKS_OF_PARTS}


def have_no_part_in_common(ours: set[str], theirs: set[str]) -> bool:
    """Tell whether two places hold parts, none of them the same: two caches, whose rows one place would join."""
    return bool(ours and theirs) and not ours & theirs


def most_bytes(name: str) -> int:
    """Return the most bytes of a small file: of the tokenizer, or JSON."""
    return MAX_TOKENIZER_FILE_BYTES if name.startswith("tokenizer/") else MAX_JSON_BYTES

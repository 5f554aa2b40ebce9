"""Are all files of a set there whose names say of how many they are, as `train-00002-of-00004.parquet`?

A download that broke off leaves some of them, and the rest would pass for the whole. Cost: looking at names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_MOST = 100_000
"""Files of one set; more is no count."""


def missing_files(paths: Sequence[Path]) -> list[str]:
    """Return the names that are missing among files which are numbered from 0 or from 1.

    >>> missing_files([Path("a-00000-of-00003.csv"), Path("a-00002-of-00003.csv"), Path("b.csv")])
    ['a-00001-of-00003.csv']
    """
    sets: dict[tuple[Path, str, str, str], set[int]] = {}
    for path in paths:
        if found := re.fullmatch(r"(.*?)(\d+)(-of-\d+.*)", path.name):
            sets.setdefault((path.parent, found[1], f"{len(found[2])}", found[3]), set()).add(int(found[2]))
    missing = []
    for (_, before, digits, after), numbers in sets.items():
        total = int(re.findall(r"\d+", after)[0])
        first = 1 if 0 not in numbers and total in numbers else 0
        if total <= _MOST:
            missing += [f"{before}{n:0{digits}d}{after}" for n in range(first, first + total) if n not in numbers]
    return missing

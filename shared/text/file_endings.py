"""What a file's name says of its kind: its endings, written in capitals or not. `TEST.JSONL.GZ` is `test.jsonl.gz`.

Names are compared here alone, so that no reader refuses what another takes.
"""

from __future__ import annotations

from pathlib import PurePath


def endings(name: str | PurePath) -> list[str]:
    """Return the endings of a file's name in small letters.

    >>> endings("runs/Test.v2.JSONL.gz")
    ['.v2', '.jsonl', '.gz']
    """
    return [ending.lower() for ending in PurePath(name).suffixes]


def ends_in(name: str | PurePath, *wanted: str) -> bool:
    """Tell whether a file's name ends in one of these, each an ending or several.

    >>> ends_in("A.TAR", ".tar"), ends_in("a.jsonl.GZ", ".jsonl", ".jsonl.gz"), ends_in("tar", ".tar")
    (True, True, False)
    """
    return PurePath(name).name.lower().endswith(wanted)

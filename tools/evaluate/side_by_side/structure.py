"""The visible structure of an answer: numbered steps, list items, code blocks and headings, counted line by line.

Steps: lines that start with `1.`, `2)` or `Step 3`. Items: lines that start with `-`, `*`, `+` or a bullet. Code:
    fenced blocks,
closed or not. Headings: lines with one to six `#` and a space, or a line that is bold as a whole. Lines inside code
count as nothing.
"""

from __future__ import annotations

import re
from collections import Counter

_FENCE = re.compile(r"^\s*```")
_LINES = {
    "steps": re.compile(r"^\s*(?:\d{1,3}[.)]\s|step\s+\d)", re.IGNORECASE),
    "items": re.compile(r"^\s*[-*+•]\s"),
    "headings": re.compile(r"^\s*(?:#{1,6}\s\S|\*\*[^*]+\*\*:?\s*$)"),
}


def structure_of(text: str) -> Counter[str]:
    r"""Return how many steps, items, blocks of code and headings a text has.

    >>> sorted(structure_of("# A\n1. first\n2. second").items())
    [('headings', 1), ('steps', 2)]
    """
    found: Counter[str] = Counter()
    inside = False
    for line in text.splitlines():
        if _FENCE.match(line):
            inside = not inside
            found["code"] += inside
        elif not inside:
            for kind, pattern in _LINES.items():
                found[kind] += pattern.match(line) is not None
    return +found


def num_kept(wanted: Counter[str], text: str) -> int:
    """Return how many parts of a wanted structure a text has, at most as many of each kind as are wanted."""
    return (wanted & structure_of(text)).total()

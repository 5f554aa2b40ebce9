"""The technical terms of an answer: what a shorter or vaguer answer loses first. By rule, no model and no word list.

A term is one of
- a code identifier: in `backticks`, with an underscore, in camelCase, a dotted name, or letters and digits in one word
  (`node7`);
- a number with its unit (`512 MB`, `12 %`, `$30`, `5 ms`);
- a capitalised word that does not start a sentence, or an acronym;
- an uncommon word: at least seven letters, in at most a fifth of the answers that it is extracted among (or in one of
  them).
Terms are compared without case and with single spaces, and found only between characters that are neither letters nor
digits.
Cost: linear in the text; a pass of it for each term of several words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tools.evaluate.tasks.keywords import plain

_UNITS = (
    "%|percent|ms|µs|us|ns|s|sec|seconds?|min|minutes?|h|hours?|days?|weeks?|months?|years?|"
    "b|kb|mb|gb|tb|kib|mib|gib|tib|bytes?|bits?|hz|khz|mhz|ghz|mm|cm|m|km|mg|g|kg|ml|l|°c|°f|k|v|w|kw|kwh|"
    "usd|eur|dollars?|euros?|cents?|tokens?|requests?|rps|qps|x"
)
_PATTERNS = (
    r"`([^`\n]{1,80})`",
    r"\b([A-Za-z]+_\w+|_\w+)\b",
    r"\b([a-z]+[A-Z]\w*|[A-Z][a-z0-9]+[A-Z]\w*)\b",
    r"\b([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)\b",
    r"\b([A-Za-z]+\d\w*)\b",
    r"(?<![\w.])([$€£]\s?\d[\d.,]*\d|[$€£]\s?\d)",
    # A number without a unit is taken, too (as nothing), or each digit of a long list would look for one at its end.
    rf"(?i)(?<![\w.])(?:(\d[\d.,]*+\s?(?:{_UNITS})(?!\w))|\d[\d.,]*+)",
    r"\b([A-Z][A-Z0-9]+)\b",
    r"(?<=[a-z,;:)] )([A-Z][a-z]+)\b",
)
_UNIT = re.compile(_UNITS)
_WORD = re.compile(r"\w+")
_LONG_WORD = re.compile(r"\b[^\W\d_]{7,}\b")
_COMMON_SHARE = 5
"""A word in more than one of so many answers is common."""


def terms_of(answers: Sequence[str]) -> list[set[str]]:
    """Return the terms of each of a set of answers, in their plain form.

    >>> sorted(terms_of(["Restart `nginx` on node7: 512 MB are used, says Anna."])[0])
    ['512 mb', 'anna', 'nginx', 'node7', 'restart']
    """
    words = [set(map(str.casefold, _LONG_WORD.findall(answer))) for answer in answers]
    seen_in = Counter(word for found in words for word in found)
    most = max(1, len(answers) // _COMMON_SHARE)
    found = []
    for answer, long_words in zip(answers, words, strict=True):
        terms = {plain(match) for pattern in _PATTERNS for match in re.findall(pattern, answer)}
        found.append(
            {term for term in terms if term and not _UNIT.fullmatch(term)}
            | {word for word in long_words if seen_in[word] <= most}
        )
    return found


def num_kept(terms: set[str], answer: str) -> int:
    """Return how many of the terms occur in an answer."""
    text = plain(answer)
    words = set(_WORD.findall(text))
    return sum(
        term in words if _WORD.fullmatch(term) else re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text) is not None
        for term in terms
    )

"""The entries of a JSON list in a file, one at a time, by the parser that reads JSON lines.

An entry is parsed where it stands in a window of the file; one that goes on beyond the window is parsed again in a
window twice as large, up to a bound. So an entry costs its own length, whatever the length of the list.
Memory: an entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from shared.text import strict_json
from shared.text.text_encoding import not_utf8

BLOCK_CHARACTERS = 2**18
_SPACE = re.compile(r"[ \t\r\n]*")


def read_list(file: TextIO, most: int) -> Iterator[Any]:
    """Yield every entry, or a ValueError in place of one in which a key comes twice, a number is too long or a byte is
    not UTF-8.

    Args:
        file: begins with `[`, white space aside; opened with `surrogateescape`.
        most: characters of an entry.

    Raises:
        ValueError: from here on it is no list of entries, or an entry is longer than `most`.

    >>> import io
    >>> list(read_list(io.StringIO(' [{"a": 1}, 2]'), 100))
    [{'a': 1}, 2]
    """
    problems: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _once(pairs, problems), parse_int=_integer(problems))
    window = _Window(file)
    window.take("[")
    if window.next_character() == "]":
        window.take("]")
    else:
        while True:
            value, text = window.entry(decoder, most)
            if said := not_utf8(text):
                problems.append(f"the entry {said}")
            yield ValueError(problems[0]) if problems else value
            problems.clear()
            if window.next_character() == "]":
                window.take("]")
                break
            window.take(",")
    if window.next_character():
        raise ValueError("something follows the list")


class _Window:
    """A part of a file, and a place in it."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._is_last = file, "", 0, False

    def next_character(self) -> str:
        """Return the next character that is no white space, which is not taken; nothing at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_last:
                return ""
            self._move()

    def take(self, wanted: str) -> None:
        """Take one character."""
        found = self.next_character()
        if found != wanted:
            raise ValueError(f"expected '{wanted}', found {f'{found!r}' if found else 'the end of the file'}")
        self._at += 1

    def entry(self, decoder: json.JSONDecoder, most: int) -> tuple[Any, str]:
        """Take one entry of at most `most` characters, and return it with its text."""
        self.next_character()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_last:
                    raise ValueError(error.msg) from None
            else:
                if end < len(self._text) or self._is_last:  # else a number may go on
                    text, self._at = self._text[self._at : end], end
                    return value, text
            if len(self._text) - self._at > most:
                raise ValueError(f"an entry has more than {most:,} characters, or is no JSON")
            self._move()

    def _move(self) -> None:
        left = self._text[self._at :]
        piece = self._file.read(max(BLOCK_CHARACTERS, len(left)))
        self._text, self._at, self._is_last = left + piece, 0, not piece


def _once(pairs: list[tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
    """Return an object, and note a key that comes twice: an error raised here would lose the place."""
    try:
        return strict_json.each_once(pairs)
    except ValueError as error:
        problems.append(str(error))
        return {}


def _integer(problems: list[str]) -> Any:
    def parsed(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            problems.append(f"a number has {len(text):,} digits")
            return 0

    return parsed

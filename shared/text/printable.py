r"""Text of strangers on a terminal or a page: what would steer the reader's screen is shown, not obeyed.

Caches, servers and models hold any character. Escape sequences rename windows, clear screens and forge lines; direction
marks make a line read as another. Each control, format, surrogate or unassigned character but newline and tab is
written as its escape. Cost: one test of the whole text; texts without such characters are returned as they are.

>>> printable("licence \x1b[31mMIT")
'licence \\x1b[31mMIT'
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata

_SHOWN = "\n\t"
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_JOINED = re.compile(
    r"(?<=\w)[\u200c\u200d](?=\w)|(?<=[\ufe0f\U0001f000-\U0001faff])\u200d(?=[\u2000-\u2bff\U0001f000-\U0001faff])"
)
"""Joiners between letters or emoji, which are part of how they are written."""


def printable(text: str) -> str:
    """Return a text with characters that steer a screen as escapes; newlines, tabs and joiners between letters stay."""
    if text.isprintable():
        return text
    joined = {match.start() for match in _JOINED.finditer(text)}
    return "".join(
        character
        if character in _SHOWN or i in joined or unicodedata.category(character) not in _HIDDEN
        else _escaped(character)
        for i, character in enumerate(text)
    )


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def say(line: str) -> None:
    """Print a line for people on standard error."""
    print(printable(line), file=sys.stderr, flush=True)


class PrintableFormatter(logging.Formatter):
    """Writes what libraries log, which quotes files of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        return printable(super().format(record))

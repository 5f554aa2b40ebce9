"""Texts of files on a page: neither markup nor anything that steers the reader's screen."""

from __future__ import annotations

import html

from shared.text.printable import printable

LONGEST_WORD = 24
"""A longer word of a table may break anywhere."""


def escape(text: str) -> str:
    r"""Return a text as HTML that shows it, direction marks and control characters as their escapes.

    >>> escape("<b>\u202e")
    '&lt;b&gt;\\u202e'
    """
    return html.escape(printable(text))


def name_of(text: str) -> str:
    """Return the markup of a table's cell; a word that would push the other columns away may break anywhere.

    >>> name_of("math"), name_of("m" * 40)[:19]
    ('math', '<span class="long">')
    """
    wide = max(map(len, text.split()), default=0) > LONGEST_WORD
    return f'<span class="long">{escape(text)}</span>' if wide else escape(text)

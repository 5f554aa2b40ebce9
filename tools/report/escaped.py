"""Texts of files on a page: neither markup nor anything that steers the reader's screen."""

from __future__ import annotations

import html

from shared.text.printable import printable


def escape(text: str) -> str:
    r"""Return a text as HTML that shows it, direction marks and control characters as their escapes.

    >>> escape("<b>\u202e")
    '&lt;b&gt;\\u202e'
    """
    return html.escape(printable(text))

"""Text of strangers on a terminal: nothing that steers it, everything that people write."""

from __future__ import annotations

import pytest

from shared.text.printable import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b]0;title\x07\x1b[31m", "\\x1b]0;title\\x07\\x1b[31m"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("x\ry\bz\x00", "x\\x0dy\\x08z\\x00"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("p\u2028q", "p\\u2028q"),
    ],
)
def test_what_steers_a_screen_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["two\nlines\tand a tab", "日本語 ü é ß", "a\u00a0b", "👩\u200d👧", "می\u200cخواهم", ""]
)
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text

"""Text of strangers on a terminal: nothing that steers it, everything that people write."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from shared.progress import Progress
from shared.text.printable import PrintableFormatter, printable, say

ROOT = Path(__file__).parents[2]
NO_USER = (("tools", "bench"), ("tools", "demo"), ("tools", "gpu"), ("tools", "gpu_check.py"))
OWN_WORDS = ("argparse", "schema_text", "version(", "page()")


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


def test_lines_progress_and_warnings_show_what_would_steer_a_terminal(capsys):
    say("a\x1b[2J")
    with Progress("b\x1b[2J", 3) as progress:
        progress.advance(1, detail="c\u202e")
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s is left out", ("d\x07",), None)
    say(PrintableFormatter().format(record))
    seen = capsys.readouterr().err
    assert (
        "a\\x1b[2J\n" in seen and "b\\x1b[2J: 1 of 3 rows" in seen and "c\\u202e" in seen and "d\\x07 is left" in seen
    )
    assert "\x1b" not in seen and "\u202e" not in seen and "\x07" not in seen


@pytest.mark.parametrize("room", ["shared", "student_train", "teacher_cache", "tools", "decant"])
def test_nothing_is_printed_as_it_came(room):
    """Every `print` of the product prints what `printable` made, or words of the program's own."""
    wild = []
    for path in sorted((ROOT / room).rglob("*.py")):
        if path.relative_to(ROOT).parts[:2] in NO_USER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                said = ast.unparse(node)
                if "printable(" not in said and not any(words in said for words in OWN_WORDS):
                    wild.append(f"{path.relative_to(ROOT)}:{node.lineno} {said}")
    allowed = ("tools/own_process.py", "shared/progress.py")
    assert [one for one in wild if not one.startswith(allowed)] == []

"""What another library said becomes one bounded line, by one function."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shared.errors import first_line, reason_of, refused

ROOT = Path(__file__).parents[2]


def test_a_reason_is_one_line_of_bounded_length_and_never_empty() -> None:
    assert reason_of(OSError("no\n  space\tleft ")) == "no space left"
    assert reason_of(ValueError("ab" * 400)) == ("ab" * 400)[:300]
    assert reason_of(ValueError("abcdef"), 3) == "abc"
    assert reason_of(MemoryError()) == "MemoryError"
    assert reason_of(ValueError(" \n")) == "ValueError"
    assert first_line(AssertionError()) == "AssertionError"


def test_no_other_place_makes_a_line_of_what_a_library_said() -> None:
    """Which would be `()` where it said nothing, or no line at all."""
    rooms = ("shared", "teacher_cache", "student_train", "tools", "decant")
    written = [
        str(path.relative_to(ROOT))
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        if "str(error).splitlines()[" in (text := path.read_text()) or "str(error).split())[" in text
    ]
    assert written == ["shared/errors.py"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EMFILE, errno.EISDIR])
def test_what_the_system_refuses_is_said_with_what_to_do(number: int) -> None:
    found, _, way_out = refused(OSError(number, os.strerror(number))).partition("; ")
    assert found == os.strerror(number)
    assert way_out
    assert refused(OSError(errno.EPIPE, "Broken pipe")) == "Broken pipe"
    assert refused(OSError("of no number")) == "of no number"

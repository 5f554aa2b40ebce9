"""What another library said becomes one bounded line, by one function."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from shared.atomic import link_exclusive, make_dir, write_atomic
from shared.errors import DecantError, first_line, reason_of, refused
from student_train.records.kept_json import read_kept
from student_train.records.one_training import only_training
from tools import cli
from tools.evaluate.results.run_shapes import read_object
from tools.evaluate.tasks.question_files import read_rows

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


def _train(path: Path) -> None:
    with only_training(path):
        pass


@pytest.mark.parametrize(
    "touch",
    [
        read_kept,
        _train,
        lambda path: list(read_rows(path)),
        lambda path: write_atomic(path, b"", "test"),
        make_dir,
        lambda path: link_exclusive(path / "file", b"", "test"),
    ],
)
def test_whoever_touches_a_file_says_what_to_do_where_the_system_refuses(
    tmp_path: Path, touch: Callable[[Path], object]
) -> None:
    with pytest.raises(DecantError, match=r": File name too long; name a shorter path$"):
        touch(tmp_path / ("a" * 300))


def test_what_cannot_be_read_of_a_run_says_what_to_do(tmp_path: Path) -> None:
    found = read_object(tmp_path / ("a" * 300), BaseModel)
    assert found == (None, "it cannot be read (File name too long; name a shorter path)")


def test_a_name_that_no_file_system_takes_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["cache", "ls"], ["plan"], ["report"], ["cache", "verify"]):
        assert cli.main([*words, "a" * 300]) == 2
        assert capsys.readouterr().err.count("\n") == 1

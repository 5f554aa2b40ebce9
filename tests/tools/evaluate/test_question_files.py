"""Files of questions that are damaged or no files are named, whatever they are instead."""

from __future__ import annotations

import gzip
import os

import pytest

from shared.errors import EvaluationError
from tools.evaluate.tasks.question_files import read_rows


def test_a_pipe_a_device_or_a_directory_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "zero.json", "folder.jsonl"):
        with pytest.raises(EvaluationError, match=rf"{name}: is no regular file; name a jsonl"):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.JSON", "a.Json.GZ", "a.JSONL.gz"])
def test_endings_in_capitals_are_read_as_those_in_small_letters(tmp_path, name):
    content = b'{"a": "b"}' if "JSONL" in name else b'[{"a": "b"}]'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert [row for _, row in read_rows(tmp_path / name)] == [{"a": "b"}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_compressed_file_that_was_altered_anywhere_is_refused(tmp_path, name):
    whole = gzip.compress(b'{"a": "b"}\n' * 2000, mtime=0)
    for place in range(0, len(whole), max(len(whole) // 40, 1)):
        data = bytearray(whole)
        data[place] ^= 0xFF
        (tmp_path / name).write_bytes(bytes(data))
        try:
            found = [row for _, row in read_rows(tmp_path / name)]
        except EvaluationError as error:
            assert name in str(error)
        else:  # a time or a flag of the header, which holds nothing of the rows
            assert place < 10
            assert found == [{"a": "b"}] * 2000

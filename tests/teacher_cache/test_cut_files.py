"""What is only a part of its data is not taken for the whole: cut files, sets with missing files, pointers of git."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.files.prompt_files import locate
from teacher_cache.prompts.files.prompt_readers import read_file
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts

ROWS = [{"text": f'row {number}, with }} and "quotes"', "tags": [number, {"a": None}]} for number in range(300)]
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.mark.parametrize("packed", [None, gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("left_out", [1, 2, 5, 9, 20, 30, 38])
def test_json_lines_that_end_within_an_object_are_refused(tmp_path, packed, left_out):
    path = tmp_path / f"a.jsonl{'' if packed is None else '.gz' if packed is gzip.compress else '.zst'}"
    data = LINES[:-left_out].encode()
    path.write_bytes(data if packed is None else packed(data))
    with pytest.raises(PromptError, match=r":300: .*ends in the middle, within an object; get it again"):
        list(read_file(path))


WRONG = ['\n{"text": "bad" "row"}', '\n{"text": oops}', "\nno row"]


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n", *WRONG])
def test_whole_lines_and_rows_that_are_merely_wrong_are_read_on(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes((LINES + ending).encode())
    rows = list(read_prompts([PromptSource(source="s", path=str(path), format="text")], problems := Problems()))
    assert len(rows) == 300
    assert problems.total == int(bool(ending.strip()))


def test_a_table_of_text_that_ends_within_a_row_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    text = "prompt,completion,id\r\n" + "".join(f"question {n},answer {n},{n}\r\n" for n in range(300))
    path.write_text(text[: text.rindex("answer 299")], newline="")
    with pytest.raises(PromptError, match=r"a.csv:301: .*ends in the middle, within a row of 3 columns"):
        list(read_file(path))
    path.write_text(text + "too,few\r\n", newline="")
    assert isinstance(list(read_file(path))[-1][1], ValueError)
    path.write_text(text.rstrip(), newline="")
    assert len(list(read_file(path))) == 300


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.json", "a.jsonl.gz", "a.arrow", "a.txt"])
def test_a_pointer_of_git_in_place_of_a_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(PromptError, match=f"{name}: holds a pointer of git LFS and no data, .*`git lfs pull`"):
        list(read_file(path))


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "a"}\n')


def located(path: Path | str, **settings):
    return locate(PromptSource(source="s", path=str(path), format="text", **settings))


def test_a_set_of_numbered_files_of_which_some_are_missing_is_refused(tmp_path):
    put(tmp_path, *(f"data/train-{n:05d}-of-00004.jsonl" for n in (0, 1, 3)), "data/test-00000-of-00001.jsonl")
    with pytest.raises(PromptError, match=r"missing by the others' names \('train-00002-of-00004.jsonl'\)") as caught:
        located(tmp_path)
    assert len(located(tmp_path, split="test").paths) == 1
    place = located(str(caught.value).rpartition("a glob such as ")[2])
    assert len(place.paths) == 3
    assert "missing by the others' names: 'train-00002-of-00004.jsonl'" in place.note


@pytest.mark.parametrize("numbers", [range(3), range(1, 4)])
def test_a_whole_set_is_read_whether_numbered_from_0_or_1(tmp_path, numbers):
    put(tmp_path, *(f"part-{n}-of-3.jsonl" for n in numbers), "more.jsonl", "1-of-many.jsonl")
    assert len(located(tmp_path).paths) == 5

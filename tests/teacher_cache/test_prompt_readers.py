"""Files become rows with their numbers, whatever their kind and compression; a file that is cut is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.files.packed_files import open_bytes
from teacher_cache.prompts.files.prompt_readers import MAX_LINE_BYTES, read_file
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
LINES = [f'{{"text": "row {number} {number * 7919 % 1009}"}}' for number in range(5000)]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_members_are_read_one_after_another(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    halves = ["".join(line + "\n" for line in LINES[start : start + 2500]).encode() for start in (0, 2500)]
    path.write_bytes(b"".join(PACK[suffix](half) for half in halves))
    assert list(read_file(path)) == list(enumerate(LINES, start=1))


@pytest.mark.parametrize("suffix", PACK)
def test_endings_in_capitals_are_read_as_those_in_small_letters(tmp_path, suffix):
    rows = {"a.JSONL": LINES[0], "a.JSON": f"[{LINES[0]}]", "a.TSV": "text\trow\nx, y\t1\n", "a.Txt": "one text"}
    for name, content in rows.items():
        small = tmp_path / name.lower()
        small.write_text(content)
        (tmp_path / f"{name}{suffix.upper()}").write_bytes(PACK[suffix](content.encode()))
        assert list(read_file(tmp_path / f"{name}{suffix.upper()}")) == list(read_file(small)) != []
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.Parquet")
    assert list(read_file(tmp_path / "a.Parquet")) == [(1, {"text": "a"})]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_a_compressed_file_that_ends_in_the_middle_is_refused_with_its_place(tmp_path, suffix, share):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = PACK[suffix]("".join(line + "\n" for line in LINES).encode())
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(PromptError, match=rf"a\.jsonl\{suffix}:\d+: cannot be read as json from here on"):
        list(read_file(path))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_that_is_cut_anywhere_is_refused(tmp_path, kind):
    """Between two batches what is left reads as a whole stream."""
    table = pa.table({"text": LINES[:40]})
    made = pa.BufferOutputStream()
    with getattr(pa.ipc, f"new_{kind}")(made, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    whole = made.getvalue().to_pybytes()
    path = tmp_path / "a.arrow"
    path.write_bytes(whole)
    assert [row["text"] for _, row in read_file(path)] == LINES[:40]
    for cut in range(0, len(whole), 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(PromptError, match=r"a\.arrow:1: cannot be read as arrow from here on"):
            list(read_file(path))


def test_a_zst_file_cut_within_its_second_frame_is_refused_and_skippable_frames_are_skipped(tmp_path):
    frame = PACK[".zst"](b'{"text": "a"}\n')
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"xyz"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + frame + skippable + frame)
    assert [number for number, _ in read_file(tmp_path / "a.jsonl.zst")] == [1, 2]
    for cut in range(1, len(frame)):
        (tmp_path / "cut.jsonl.zst").write_bytes(frame + frame[:cut])
        with pytest.raises(PromptError, match=r"cut\.jsonl\.zst:2: .*ends in the middle"):
            list(read_file(tmp_path / "cut.jsonl.zst"))


def test_zst_bytes_are_those_of_the_library(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a.zst").write_bytes(zstandard.compress(data))
    with open_bytes(tmp_path / "a.zst") as file:
        assert file.read() == data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_json_list_is_read_row_by_row(tmp_path, suffix):
    rows = [{"text": "eins\u2028", "score": 0.5}, {"text": "zwei", "nested": [1, {"a": None}]}, ["no object"]]
    path = tmp_path / f"a.json{suffix}"
    data = "\ufeff" + json.dumps(rows, ensure_ascii=False, indent=2)
    path.write_bytes(PACK[suffix](data.encode()) if suffix else data.encode())
    assert list(read_file(path)) == list(enumerate(rows, start=1))


def test_a_json_list_that_is_cut_is_refused_with_its_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}])[:-4])
    with pytest.raises(PromptError, match=r"a\.json:2: cannot be read as json from here on"):
        list(read_file(path))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", '{"text": "one", "text": "two"}\n{"text": "three"}\n'),
        ("a.json", '[{"text": "one", "text": "two"}, {"text": "three"}]'),
        ("deep.json", '[{"text": "one", "meta": [{"x": 1, "y": {"z": 1, "z": 1}}]}, {"text": "three"}]'),
    ],
)
def test_a_key_that_an_object_has_twice_is_named_and_the_next_row_is_read(tmp_path, name, rows):
    (tmp_path / name).write_text(rows)
    problems = Problems()
    source = PromptSource(source="s", path=str(tmp_path / name), format="text")
    assert [talk.text for talk in read_prompts([source], problems)] == ["three"]
    assert [problem.line for problem in problems.listed] == [1]
    assert "twice" in problems.listed[0].sentence()


@pytest.mark.parametrize("bad", [1, 2, 700, 2999])
def test_of_a_json_list_the_row_that_has_a_key_twice_is_set_aside_and_no_other(tmp_path, bad):
    texts = [json.dumps({"text": f"row {number}"}) for number in range(1, 3000)]
    texts[bad - 1] = f'{{"text": 1, {texts[bad - 1][1:]}'
    (tmp_path / "a.json").write_text(f"[{', '.join(texts)}]")
    found = dict(read_file(tmp_path / "a.json"))
    assert [number for number, row in found.items() if isinstance(row, ValueError)] == [bad]
    assert all(row == {"text": f"row {number}"} for number, row in found.items() if number != bad)


def test_a_json_list_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)) + "]")
    next(read_file(path))
    tracemalloc.start()
    assert sum(1 for _ in read_file(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_tables_of_text_keep_their_values_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,answer\r\n"a ""b"",\nc",007\r\n\r\nNA,\r\nx\r\n'.encode())
    (tmp_path / "a.tsv").write_text("prompt\tanswer\n2,5\t1e3\n")
    first, second, third = read_file(tmp_path / "a.csv")
    assert first == (2, {"prompt": 'a "b",\nc', "answer": "007"})
    assert second == (5, {"prompt": "NA", "answer": ""})
    assert third[0] == 6 and "1 values and the first line names 2 columns" in str(third[1])
    assert list(read_file(tmp_path / "a.tsv")) == [(2, {"prompt": "2,5", "answer": "1e3"})]


@pytest.mark.parametrize("name, content", [
    ("Frage, kurz", '\ufeff"Frage, kurz";Antwort\n"a;b";3,5\n'), ("Frage", "Frage\tAntwort\na;b\t3,5\n"),
])  # fmt: skip
def test_a_table_whose_first_line_has_other_separators_is_read_by_them(tmp_path, name, content):
    (tmp_path / "a.csv").write_text(content)
    assert list(read_file(tmp_path / "a.csv")) == [(2, {name: "a;b", "Antwort": "3,5"})]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,a\n1,2\n", r"a\.csv:1: the first line must name each column once"),
        (b",a\n0,2\n", r"a\.csv:1: the first line must name each column once, found '', 'a'; .*index=False"),
        (b'a,b\n1,"open\n', r"a\.csv:2: cannot be read as csv"),
        (b"a,gr\xf6\xdfe\n1,2\n", r"a\.csv:1: the first line is not UTF-8 \(byte 0xf6 after 'agr'\); convert"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(PromptError, match=reason):
        list(read_file(tmp_path / "a.csv"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_a_text_in_another_encoding_is_named_and_the_advice_works(tmp_path, name, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    data = (mark + '{"text": "ä"}\n').encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(PromptError, match=f"is {encoding[:6].upper()} and .*iconv -f {encoding[:6].upper()} -t UTF-8"):
        list(read_file(path))
    if name == "a.jsonl":
        path.write_bytes(subprocess.check_output(["iconv", "-f", encoding[:6].upper(), "-t", "UTF-8"], input=data))
        assert [json.loads(row.removeprefix("\ufeff")) for _, row in read_file(path)] == [{"text": "ä"}]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", '{"text": "ä"}\n{"text": "caf%"}\n{"text": "b"}\n', 3),
        ("a.json", '[{"text": "ä"},\n{"text": "caf%"}, {"text": "b"}]', 3),
        ("a.csv", "text,n\nä,1\ncaf%,2\nb,3\n", 3),
        ("a.txt", "ä caf%", 1),
    ],
)
def test_a_row_that_is_not_utf8_says_so_the_others_are_read_and_the_advice_works(tmp_path, name, content, rows):
    (tmp_path / name).write_bytes(content.encode().replace(b"%", b"\xe9"))
    found = list(read_file(tmp_path / name))
    (problem,) = (row for _, row in found if isinstance(row, ValueError))
    assert len(found) == rows and re.search(r"not UTF-8 \(byte 0xe9 after '.*caf'\); convert", str(problem))
    (tmp_path / name).write_bytes(content.replace("%", "é").encode("windows-1252"))
    advice = re.search(r"(iconv .*) OLD > NEW", str(problem))
    (tmp_path / name).write_bytes(subprocess.check_output([*str(advice[1]).split(), str(tmp_path / name)]))
    assert not any(isinstance(row, ValueError) for _, row in read_file(tmp_path / name))
    assert "café" in str(list(read_file(tmp_path / name)))


def test_a_list_of_texts_says_so_and_the_advice_works(tmp_path):
    (tmp_path / "a.json").write_text('["one", "{\\"text\\": \\"two\\"}"]')
    first, second = (row for _, row in read_file(tmp_path / "a.json"))
    assert str(first) == str(second) and "the row is text but must be an object" in str(first)
    program = re.search(r"jq -c '(.*)' OLD", str(first))
    if shutil.which("jq"):
        (tmp_path / "a.jsonl").write_bytes(subprocess.check_output(["jq", "-c", program[1], str(tmp_path / "a.json")]))
        assert json.loads(next(read_file(tmp_path / "a.jsonl"))[1]) == {"prompt": "one"}


def test_a_txt_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOnce\n\nupon a time\n")
    assert list(read_file(tmp_path / "a.txt")) == [(1, {"text": "Once\n\nupon a time\n"})]
    (tmp_path / "b.txt").write_bytes(b"\xe4")
    (tmp_path / "c.txt").write_bytes(b"x" * (MAX_LINE_BYTES + 1))
    for name, reason in (("b.txt", "not UTF-8 (byte 0xe4"), ("c.txt", "split it into files")):
        ((_, problem),) = read_file(tmp_path / name)
        assert reason in str(problem)


def test_parquet_rows_lose_the_nulls_that_their_columns_add(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": None},
        {"messages": [{"role": "assistant", "content": "b", "weight": 0}], "tools": [{"name": "f"}]},
    ]
    path = Path(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [row for _, row in read_file(path)] == [{"messages": rows[0]["messages"]}, rows[1]]


@pytest.mark.parametrize("suffix", PACK)
def test_what_follows_a_compressed_member_and_is_none_is_refused_not_left_out(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    member = PACK[suffix](b'{"text": "a"}\n')
    path.write_bytes(member + b"X" + member[1:])
    with pytest.raises(PromptError, match=rf"a\.jsonl\{suffix}:2: cannot be read as json from here on"):
        list(read_file(path))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv"])
def test_a_file_made_to_unpack_to_any_size_takes_no_memory(tmp_path, name):
    start = {"a.txt": b"", "a.json": b'[{"text": "', "a.csv": b'text\n"'}[name]
    path = tmp_path / f"{name}.zst"
    with zstandard.open(path, "wb") as file:
        file.write(start)
        for _ in range(512):
            file.write(b"a" * 2**20)
    tracemalloc.start()
    try:
        rows = list(read_file(path))
        assert all(isinstance(row, ValueError) for _, row in rows)
    except PromptError as error:
        assert "16,777,216 characters" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20


def test_a_file_that_unpacks_out_of_all_proportion_is_refused(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b"\n" * 2**28))
    with pytest.raises(PromptError, match=r"more than 1,024 times its size, .*; unpack it by hand if it is meant"):
        list(read_file(tmp_path / "a.jsonl.xz"))


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_what_a_kilobyte_unpacks_to_is_taken_a_block_at_a_time(tmp_path, suffix):
    made = {".bz2": bz2.BZ2Compressor, ".xz": lzma.LZMACompressor}[suffix]()
    packed = b"".join([*(made.compress(b"\n" * 2**20) for _ in range(128)), made.flush()])
    assert len(packed) < 2**15
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    tracemalloc.start()
    with open_bytes(tmp_path / f"a.jsonl{suffix}") as file, pytest.raises(ValueError, match="more than 1,024 times"):
        while file.read(2**16):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25  # the window of xz among it


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"text": ' + "[" * 100_000], ids=["list", "value"])
def test_a_json_list_that_is_nested_without_end_is_refused_at_once(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PromptError, match=r"a\.json:1: cannot be read as json from here on \(maximum recursion"):
        list(read_file(tmp_path / "a.json"))


def test_entries_of_a_json_list_have_the_problems_that_lines_have(tmp_path):
    texts = [
        '{"text": "\\ud800"}',
        '{"text": "a", "text": "b"}',
        '{"text": "a", "n": ' + "9" * 5000 + "}",
        '{"text": NaN}',
        '{"text": "c"}',
    ]
    (tmp_path / "a.json").write_text("[" + ",".join(texts) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    told = []
    for name in ("a.json", "a.jsonl"):
        problems = Problems()
        source = PromptSource(source="s", path=str(tmp_path / name), format="text")
        rows = [row.text for row in read_prompts([source], problems)]
        told.append((rows, [problem.line for problem in problems.listed]))
    assert told[0] == told[1] == (["c"], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "a"},]', "Expecting value"),
        ('[{"text": "a"}{"text": "b"}]', "expected ','"),
        ('[{"text": "a"}] x', "something follows the list"),
        ('[{"text": "a"}, ' + '{"text": "' + "b" * 400_000, "Unterminated string"),
    ],
)
def test_what_is_no_json_list_is_refused_after_the_entries_before_it(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    rows = read_file(tmp_path / "a.json")
    assert next(rows) == (1, {"text": "a"})
    with pytest.raises(PromptError, match=rf"a\.json:2: cannot be read as json from here on \({reason}"):
        next(rows)


def test_entries_longer_than_a_block_are_read(tmp_path):
    rows = [{"text": "a" * length} for length in (2**18 - 12, 2**18, 3 * 2**20)] + [{"text": "z"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [row for _, row in read_file(tmp_path / "a.json")] == rows


def test_a_parquet_file_that_claims_to_unpack_to_anything_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["A" * 2**27]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(PromptError, match=r"a\.parquet:1: .*claims to unpack to 134,2"):
        list(read_file(tmp_path / "a.parquet"))


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": DEEP},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
            ]
        },
    ],
    ids=["tools", "arguments"],
)
def test_json_within_a_row_that_is_nested_without_end_sets_the_row_aside(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    problems = Problems()
    source = PromptSource(source="s", path=str(tmp_path / "a.jsonl"), format="messages")
    assert list(read_prompts([source], problems)) == []
    assert "nested too deeply" in problems.listed[0].reason


def test_a_saved_data_set_whose_description_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(DEEP)
    with pytest.raises(PromptError, match=r"is no data set as `save_to_disk` writes it .*nested too deeply"):
        list(read_prompts([PromptSource(source="s", path=str(tmp_path), format="text")], Problems()))


def test_no_line_is_looked_for_behind_one_that_does_not_end(tmp_path):
    path = tmp_path / "zeros.jsonl"
    path.write_text('{"prompt": "a"}\n')
    os.truncate(path, 2**42)
    rows = read_file(path)
    assert next(rows) == (1, '{"prompt": "a"}')
    with pytest.raises(PromptError, match=r"zeros\.jsonl:2: the line has more than 1,073,741,824 characters"):
        next(rows)

"""Parquet and Arrow files of strangers: every row as `datasets` reads it, and none that takes more than its file is
worth.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import PromptError
from teacher_cache.prompts.files.prompt_readers import read_file, without_nulls

TEXT = "x" * 2**16


def rows_of(path: Path) -> list:
    return [row for _, row in read_file(path)]


def write_arrow(path: Path, table: pa.Table, *, stream: bool, compression: str | None = None) -> Path:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return path


def named_often(count: int) -> pa.Table:
    """One text, named in `count` rows."""
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([TEXT]))})


def with_footer_that_lies(path: Path, said: set[int], instead: int = 1000) -> Path:
    """Write another number for sizes of a Parquet footer, as long as what it replaces."""

    def varint(value: int, length: int = 0) -> bytes:
        value <<= 1
        found = bytearray()
        while value or len(found) < max(length, 1):
            found.append(value & 127 | 128)
            value >>= 7
        return bytes([*found[:-1], found[-1] & 127])

    data = path.read_bytes()
    (size,) = struct.unpack("<i", data[-8:-4])
    footer = data[-8 - size : -8]
    for value in said:
        assert varint(value) in footer
        footer = footer.replace(varint(value), varint(instead, len(varint(value))))
    path.write_bytes(data[: -8 - size] + footer + data[-8:])
    return path


def varied() -> pa.Table:
    turns = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "name": "a"}], [], None]
    numbers = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3], pa.int32()), pa.array([1, 2, 3], pa.int16()))
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), pa.array(["a", "ü"]))
    return pa.table({
        "messages": turns, "n": numbers, "label": labels, "flag": [True, None, False],
        "wide": pa.array(["a", None, "c"], pa.large_string()), "raw": [b"\0\1", b"", None], "none": [None] * 3,
    })  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "zstd"])
def test_rows_are_those_that_datasets_reads(tmp_path, kind):
    import datasets

    table = varied()
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(table, path)
    else:
        path = write_arrow(
            tmp_path / "a.arrow", table, stream=kind == "stream", compression="zstd" if kind == "zstd" else None
        )
    plain = table.set_column(2, "label", table["label"].cast(pa.string()))
    pq.write_table(plain, tmp_path / "plain.parquet")
    files = str(tmp_path / "plain.parquet")
    expected = datasets.load_dataset("parquet", split="train", streaming=True, data_files=files)
    assert rows_of(path) == [without_nulls(row) for row in expected]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_under_a_name_that_is_no_utf8_is_read(tmp_path, kind):
    table = pa.table({"prompt": ["2 + 2?"]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        write_arrow(path, table, stream=True)
    named = path.rename(tmp_path / os.fsdecode(b"caf\xe9." + kind.encode()))
    assert rows_of(named) == [{"prompt": "2 + 2?"}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_objects_kept_as_json_texts_come_back_as_objects_and_images_stay_bytes(tmp_path, kind):
    import datasets

    features = datasets.Features({
        "tools": datasets.List(datasets.Json()),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
    })  # fmt: skip
    data = datasets.Dataset.from_dict(
        {"tools": [[{"a": 1}, {"b": [2]}]], "image": [{"bytes": b"no image", "path": None}], "label": [1]},
        features=features,
    )
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(tmp_path / "saved")
        path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    assert rows_of(path) == [{"tools": [{"a": 1}, {"b": [2]}], "image": {"bytes": b"no image"}, "label": 1}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_is_named_in_many_rows_is_never_unpacked_at_once(tmp_path, kind):
    path, table = tmp_path / f"a.{kind}", named_often(200_000)  # 13 GB as plain texts, of a few kilobytes
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        write_arrow(path, table, stream=True, compression="zstd")
    before = pa.total_allocated_bytes()
    rows = read_file(path)
    assert [next(rows) for _ in range(2)] == [(1, {"text": TEXT}), (2, {"text": TEXT})]
    assert pa.total_allocated_bytes() - before < 2**25
    with pytest.raises(PromptError, match=rf"a\.{kind}:\d+: .*unpack to more than 1,024 times its size"):
        list(rows)


def test_a_row_that_names_a_text_many_times_is_set_aside_unread(tmp_path):
    inner = named_often(2**12)["text"].chunk(0)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2**12], pa.int32()), inner)
    path = write_arrow(tmp_path / "a.arrow", pa.table({"texts": lists}), stream=True)
    (first, second) = rows_of(path)
    assert first == {"texts": [TEXT]}
    assert "the row takes 268,4" in str(second)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_batch_that_unpacks_out_of_proportion_is_refused_before_it_is_unpacked(tmp_path, stream, compression):
    table = pa.table({"text": ["y" * 2**20] * 100})
    if compression == "lz4":  # which packs 250 to 1 at most; so one that says more than it holds
        path = write_arrow(tmp_path / "a.arrow", table.slice(0, 1), stream=stream, compression="lz4")
        claim = struct.Struct("<qI")  # the length before a frame, and the frame's first word
        said, wanted = claim.pack(2**20, 0x184D2204), claim.pack(2**40, 0x184D2204)
        assert path.read_bytes().count(said) == 1
        path.write_bytes(path.read_bytes().replace(said, wanted))
    else:
        path = write_arrow(tmp_path / "a.arrow", table, stream=stream, compression="zstd")
    with pytest.raises(PromptError, match=r"a\.arrow:1: .*claims to unpack to [\d,]+ bytes, and at most"):
        rows_of(path)


@pytest.mark.parametrize("lies", [False, True])
def test_pages_are_counted_by_their_own_headers(tmp_path, lies):
    path = tmp_path / "a.parquet"
    numbers = pa.ListArray.from_arrays(pa.array([0, 2**25], pa.int32()), pa.array(np.zeros(2**25, np.int8)))
    pq.write_table(pa.table({"n": numbers}), path, compression="zstd", write_statistics=False)
    assert path.stat().st_size < 2000
    if lies:
        chunk = pq.read_metadata(path).row_group(0).column(0)
        with_footer_that_lies(path, {chunk.num_values})
    with pytest.raises(PromptError, match=r"a\.parquet:1: .*claims to unpack to 134,2"):
        rows_of(path)
        with_footer_that_lies(path, {1000}, instead=0)  # no value at all, so that no page is unpacked
        before = pa.total_allocated_bytes()
        with pytest.raises(PromptError):
            rows_of(path)
        assert pa.total_allocated_bytes() - before < 2**25
    pq.write_table(pa.table({"text": ["A" * 2**27]}), path, compression="zstd", use_dictionary=False)
    if lies:
        group = pq.read_metadata(path).row_group(0)
        with_footer_that_lies(path, {group.total_byte_size, group.column(0).total_uncompressed_size})
    with pytest.raises(PromptError, match=r"a\.parquet:1: .*claims to unpack to 134,2"):
        rows_of(path)


@pytest.mark.parametrize("place", range(0, 600, 7))
def test_a_damaged_table_is_one_sentence(tmp_path, place):
    for name, path in (("parquet", tmp_path / "a.parquet"), ("arrow", tmp_path / "a.arrow")):
        if name == "parquet":
            pq.write_table(varied(), path)
        else:
            write_arrow(path, varied(), stream=bool(place % 2), compression="zstd")
        data = bytearray(path.read_bytes())
        data[-place % len(data)] ^= 0xFF
        path.write_bytes(data)
        try:
            rows_of(path)
        except PromptError as error:
            assert str(error).startswith(f"{path}:") and "\n" not in str(error)

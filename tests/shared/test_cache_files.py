"""Files under the reader's feet: cut while mapped, adopted while cleaned up, linked, shipped with a model."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from shared.atomic import TEMPORARY_MARK, fill_atomic
from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.tokenizer_files import checked_tokenizer, read_tokenizer_files
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.garbage import collect_garbage
from shared.errors import DamagedError
from shared.identity.weights_hash import tokenizer_hash
from shared.parts.cache_files import list_folder, parse_json, read_bounded
from shared.parts.part_stats import sequences_stats
from shared.parts.parts import commit_part
from shared.parts.records import list_records
from shared.parts.sequences import rows_to_table
from shared.payload.frame import compress_planes, decompress_frame
from shared.payload.hidden import HiddenStates, Vectors
from shared.payload.hidden_codec import HiddenCodec
from shared.seconds import add_seconds, read_seconds
from tests.shared.small_cache import SEQUENCES, TOKENIZER, TOP, build, plan_rows, sequence

TARGETS = f"targets/{TOP.name}-{TOP.hash8}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    build(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("folder", ["sequences", TARGETS])
def test_part_that_is_cut_while_it_is_mapped_is_named_and_kills_nobody(path: Path, folder: str) -> None:
    cache = Cache.open(path)
    assert cache[0].targets is not None
    os.truncate(sorted((path / folder).glob("*.arrow"))[0], 100)
    with pytest.raises(
        DamagedError, match=r"has 100 bytes where its record says .* cut or altered after it was committed"
    ):
        cache[0]


def test_part_that_vanishes_while_it_is_mapped_is_named(path: Path) -> None:
    cache = Cache.open(path)
    assert cache[0].targets is not None
    sorted((path / "sequences").glob("*.arrow"))[0].unlink()
    with pytest.raises(DamagedError, match="is gone while it is in use"):
        cache[0]


def test_build_that_adopts_a_part_while_it_is_cleaned_up_keeps_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = sorted((path / "sequences").glob("part-*.arrow"))[0]
    part.with_suffix(".json").unlink()
    os.utime(part, (1, 1))
    rename = Path.rename
    for adopted_first in (True, False):
        asleep, awake = threading.Event(), threading.Event()

        def slow(self: Path, target: Path, first: bool = adopted_first, asleep=asleep, awake=awake) -> Path:
            if self != part or threading.current_thread() is threading.main_thread():
                return rename(self, target)
            if not first:
                rename(self, target)
            asleep.set()
            awake.wait(30)
            return rename(self, target) if first else target

        monkeypatch.setattr(Path, "rename", slow)
        cleaning = threading.Thread(target=collect_garbage, args=(path, False))
        cleaning.start()
        asleep.wait(30)
        build(path)
        awake.set()
        cleaning.join()
        assert list(verify_cache(path)) == []
        assert part.exists()
        part.with_suffix(".json").unlink()
        os.utime(part, (1, 1))


def test_record_whose_part_was_cleaned_up_meanwhile_is_taken_back_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "sequences"
    directory.mkdir()
    rows = [sequence(row) for row in plan_rows(0, 3)]
    removed = []

    def cleaned(target: Path, data: bytes, what: str) -> None:
        target.write_bytes(data)
        if not removed:
            removed.append(target.with_suffix(".arrow"))
            removed[0].unlink()

    monkeypatch.setattr("shared.parts.parts.write_atomic", cleaned)
    record = commit_part(directory, "part-0123abcd-000000", rows_to_table(rows), sequences_stats(rows), {}, [])
    assert removed[0].stat().st_size == record.bytes
    assert list_records(directory) == [record]


def test_cleaning_up_enters_no_link(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (".notes.tmp-mine", "part-0123abcd-000001.arrow"):
        (elsewhere / name).write_bytes(b"mine")
        os.utime(elsewhere / name, (1, 1))
    shutil.rmtree(path / "tokenizer")
    (path / "tokenizer").symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="tokenizer is a link where a cache has a directory"):
        collect_garbage(path, dry_run=False)
    assert len(list(elsewhere.iterdir())) == 2


def test_a_file_that_is_being_written_stays_though_the_clock_says_it_is_old(path: Path) -> None:
    left = path / "sequences" / f".part.arrow{TEMPORARY_MARK}1-a"
    left.write_bytes(b"left")
    os.utime(left, (1, 1))

    def fill(file: BinaryIO) -> None:
        file.write(b"whole")
        file.flush()
        os.utime(file.fileno(), (1, 1))
        assert collect_garbage(path, dry_run=False) == [left]

    fill_atomic(path / "sequences" / "part.arrow", fill, "test", 5)
    assert (path / "sequences" / "part.arrow").read_bytes() == b"whole"


def test_tokenizer_is_read_from_a_copy_of_the_listed_files_alone(path: Path) -> None:
    (path / "tokenizer" / "merges.txt").symlink_to("/etc/hostname")
    assert read_tokenizer_files(path) == TOKENIZER
    with checked_tokenizer(path) as directory:
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == TOKENIZER
    assert not directory.exists()
    (path / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER["tokenizer.json"].replace(b"vocab", b"VOCAB"))
    with (
        pytest.raises(DamagedError, match=r"tokenizer\.json was altered after it was written"),
        checked_tokenizer(path),
    ):
        pass


@pytest.mark.parametrize("place", [os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, place) -> None:
    place(tmp_path / "x")
    with pytest.raises(DamagedError, match="where a cache has a regular file"):
        read_bounded(tmp_path / "x", 10)
    with pytest.raises(DamagedError, match=r"cannot be read|where a cache has a directory"):
        list_folder(tmp_path / "x" / "y" if (tmp_path / "x").is_fifo() else Path("/proc/self/exe"))


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 20, "[" + "[]," * 2**21 + "0]"])
def test_json_of_odd_numbers_or_too_many_values_is_refused(text: str) -> None:
    with pytest.raises(DamagedError, match=r"finite|digits|values"):
        parse_json(b'{"a": ' + text.encode() + b"}", "here")


def test_frame_holds_no_more_than_its_own_bytes_justify() -> None:
    rng = np.random.default_rng(0)
    real = [rng.integers(0, 4, 2**20).astype(np.uint8) for _ in range(40)]
    assert len(decompress_frame(compress_planes(real), 2**30)) == 40 * 2**20
    with pytest.raises(ValueError, match="all but constant"):
        compress_planes([np.zeros(2**25, np.uint8)])
    assert len(decompress_frame(compress_planes([np.zeros(2**24, np.uint8)]), 2**30)) == 2**24


@pytest.mark.parametrize("scale, fits", [(2.6e36, True), (2.7e36, False), (3e38, False)])
def test_scale_of_a_hidden_state_that_leaves_float32_is_refused(scale: float, fits: bool) -> None:
    codec = HiddenCodec(1, 2)
    states = Vectors(np.array([[[127, -127]]], np.int8), np.array([[scale]], np.float32))
    if fits:
        assert np.isfinite(codec.decode(codec.encode(HiddenStates(states)), 1).states.dense()).all()
        return
    with pytest.raises(ValueError, match="makes states that are not"):
        codec.encode(HiddenStates(states))


def test_seconds_of_a_run_add_up_or_are_refused_before_any_work(tmp_path: Path) -> None:
    assert read_seconds(tmp_path) == {}
    add_seconds(tmp_path, "teach", 1.5)
    add_seconds(tmp_path, "teach", 2.0)
    assert read_seconds(tmp_path) == {"teach": 3.5}
    for text in ("{", "[]", '{"teach": "x"}', '{"teach": -1}', '{"teach": NaN}'):
        (tmp_path / "seconds.json").write_text(text)
        with pytest.raises(DamagedError, match="delete it and run the command again"):
            read_seconds(tmp_path)


def test_tokenizer_that_is_not_the_one_of_the_cache_is_refused_although_every_checksum_agrees(tmp_path: Path) -> None:
    mine, other = (b'{"model": {"type": "BPE", "vocab": {"a": %d, "b": %d}}}' % pair for pair in ((0, 1), (1, 0)))
    identity = dataclasses.replace(SEQUENCES, tokenizer_hash=tokenizer_hash(mine))
    CacheWriter.create_or_open(tmp_path / "right", identity, {"tokenizer.json": mine})
    CacheWriter.create_or_open(tmp_path / "wrong", identity, {"tokenizer.json": other})
    assert list(verify_cache(tmp_path / "right")) == []
    with checked_tokenizer(tmp_path / "right") as directory:
        assert (directory / "tokenizer.json").read_bytes() == mine
    message = r"tokenizer\.json hashes to \w{32} where cache\.json says tokenizer_hash"
    with pytest.raises(DamagedError, match=message), checked_tokenizer(tmp_path / "wrong"):
        pass
    assert [bool(re.search(message, problem)) for problem in verify_cache(tmp_path / "wrong")] == [True]

"""Atomic files: whole or absent, first or last as asked, and a full disk is one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.atomic import fill_atomic, link_exclusive, write_atomic
from shared.errors import CacheError

ROOT = Path(__file__).resolve().parents[2]


def test_write_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", b"one", "test")
    write_atomic(tmp_path / "a.json", b"two", "test")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"two"


def test_link_lets_exactly_one_of_many_win(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: link_exclusive(tmp_path / "plan", str(i).encode(), "test"), range(40)))
    assert sum(won) == 1
    assert (tmp_path / "plan").read_bytes() == str(won.index(True)).encode()
    assert len(list(tmp_path.iterdir())) == 1


def test_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old", "test")

    def fill(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError):
        fill_atomic(tmp_path / "a", fill, "test", 8)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_sentence_with_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        CacheError, match=r"a\.json cannot be written: .*it needs 1,234 bytes and [\d,]+ bytes are free"
    ) as caught:
        write_atomic(tmp_path / "a.json", bytes(1234), "test")
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheError, match=r"plan cannot be written: [^;]*; [\d,]+ bytes are free, so free"):
        fill_atomic(tmp_path / "plan", lambda file: file.write(bytes(1234)), "test", 0)
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_stops_a_build_with_one_sentence_and_it_continues_afterwards(tmp_path: Path) -> None:
    code = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from shared.errors import CacheError\n"
        "from tests.shared.small_cache import build\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: build(Path(sys.argv[1]))\n"
        "except CacheError as error: print(error); sys.exit(error.exit_code)"
    )
    cache = tmp_path / "cache"
    child = subprocess.run(
        [sys.executable, "-c", code, str(cache)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 1, child.stderr
    assert "cannot be written: File too large" in child.stdout
    assert len(child.stdout.strip().splitlines()) == 1
    assert not [path for path in cache.rglob("*") if ".tmp-" in path.name]

    from shared.cache.reading.verify import verify_cache
    from tests.shared.small_cache import build

    build(cache)
    assert list(verify_cache(cache)) == []


def test_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"missing/a cannot be written: No such file or directory"):
        write_atomic(tmp_path / "missing" / "a", b"", "test")

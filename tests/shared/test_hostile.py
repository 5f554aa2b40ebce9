"""Caches that were altered by somebody who knows the format: each is named in a sentence, in little memory and time."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import CacheError
from tests.shared import hostile

MOST_BYTES = 2**30
MOST_SECONDS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "base"
    hostile.make(path)
    assert list(verify_cache(path)) == []
    return path


def read(path: Path) -> list[str]:
    """Read a cache as everything does that reads one; return what was said."""
    said: list[str] = []
    for layer in (hostile.TARGETS, hostile.DRAWS):
        try:
            cache = Cache.open(path, targets=layer.split("/")[1], hidden=True)
            assert len(cache.num_tokens) == len(cache.sources) == len(cache)
            for i in range(len(cache)):
                cache[i]
            cache.stats()
            read_tokenizer_files(path)
        except CacheError as error:
            said.append(str(error))
    return said + list(verify_cache(path))


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_cache_is_named_in_a_sentence(base: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache"
    shutil.copytree(base, path)
    hostile.CASES[name](path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
            said = read(path)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(writer, f"{grown} {len(said)} {' | '.join(said)}"[:60_000].encode("utf-8", "replace"))
            code = 0
        except BaseException as error:  # noqa: BLE001 - the parent shows it
            os.write(writer, f"{type(error).__name__}: {error}"[:2000].encode("utf-8", "replace"))
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0, text
    grown_kib, count, said = text.split(" ", 2)
    assert int(grown_kib) * 1024 < MOST_BYTES
    assert int(count) > 0
    assert "\n" not in said


def test_there_are_a_hundred_of_them() -> None:
    assert len(hostile.CASES) >= 100

"""Files of a cache's tokenizer, compared with what cache.json says of them at every use.

Whatever reads a tokenizer reads a copy that holds the listed files alone: libraries look for many names, and one that
cache.json does not list, a link among them, is nobody's. Cost: each file is read once per use, tens of milliseconds
for 11 MB.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from shared.cache.layout import CacheHeader, read_header, tokenizer_path
from shared.errors import DamagedError
from shared.identity.weights_hash import tokenizer_hash
from shared.parts.cache_files import list_folder, read_bounded

_HASH_DIGITS = 32
"""Of a real hash; test caches have other names."""


def read_tokenizer_file(cache_dir: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of a directory's `tokenizer/`, of which cache.json lists name, `bytes` and `xxh3`.

    Raises:
        DamagedError: it is missing, no regular file, or not what was written.
    """
    path = tokenizer_path(cache_dir, name)
    folder = path.parent
    while folder != cache_dir:
        list_folder(folder)
        folder = folder.parent
    data = read_bounded(path, entry["bytes"])
    if (len(data), xxhash.xxh3_128_hexdigest(data)) != (entry["bytes"], entry["xxh3"]):
        raise DamagedError(f"{path} was altered after it was written; restore it from a copy")
    return data


def read_tokenizer_files(cache_dir: Path) -> dict[str, bytes]:
    """Return every tokenizer file's bytes by name; errors as for `read_tokenizer_file` and `read_header`."""
    listed = read_header(cache_dir).tokenizer_files
    return {name: read_tokenizer_file(cache_dir, name, entry) for name, entry in listed.items()}


def check_tokenizer_hash(cache_dir: Path, header: CacheHeader) -> None:
    """Compare tokenizer.json with the `tokenizer_hash` that students are compared with.

    Raises:
        DamagedError: it is another tokenizer.
    """
    entry, said = header.tokenizer_files.get("tokenizer.json"), header.identity.tokenizer_hash
    if entry is None or len(said) != _HASH_DIGITS:
        return
    found = tokenizer_hash(read_tokenizer_file(cache_dir, "tokenizer.json", entry))
    if found != said:
        path = tokenizer_path(cache_dir, "tokenizer.json")
        raise DamagedError(
            f"{path} hashes to {found} where cache.json says tokenizer_hash {said}; restore it from a copy"
        )


def tokenizer_without_code(cache_dir: Path) -> dict[str, bytes]:
    """Return what `read_tokenizer_files` does, of a tokenizer that loads without Python that came with the cache.

    Raises:
        DamagedError: it brings Python, names some in `auto_map`, or is not the one that `tokenizer_hash` says; else as
            for `read_tokenizer_files`.
    """
    files = read_tokenizer_files(cache_dir)
    check_tokenizer_hash(cache_dir, read_header(cache_dir))
    code = next((name for name in sorted(files) if name.endswith((".py", ".pyc", ".so"))), None)
    found = f"{cache_dir / 'tokenizer'} holds {code}" if code else None
    for name in ("tokenizer_config.json", "config.json"):
        if found is None and b'"auto_map"' in files.get(name, b""):
            found = f"{cache_dir / 'tokenizer' / name} names Python to run (`auto_map`)"
    if found is not None:
        raise DamagedError(
            f"{found}, and a cache's tokenizer is read without running code of its own; build the cache anew, which "
            "keeps tokenizer.json and leaves such entries out"
        )
    return files


@contextlib.contextmanager
def checked_tokenizer(cache_dir: Path) -> Iterator[Path]:
    """Yield a temporary directory of a cache's tokenizer files alone; errors as for `tokenizer_without_code`."""
    files = tokenizer_without_code(cache_dir)
    with tempfile.TemporaryDirectory(prefix="decant-tokenizer-") as directory:
        for name, data in files.items():
            path = Path(directory) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        yield Path(directory)

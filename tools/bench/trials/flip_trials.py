"""What one flipped byte does to a cache: in no file may anything that is read or shown change in silence.

    python -m tools.bench.trials.flip_trials --cache data/golden/format-1-sealed/cache --count 10000
    python -m tools.bench.trials.flip_trials --cache data/golden/format-1-sealed/cache --count 1000 --remote

Each trial flips one byte of one file of a copy, files in turn, and reads everything: every row with its targets and
hidden states, the columns, the statistics, what `decant cache ls` lists, every unit of every plan, every tokenizer
file, and each part as an export reads it. It must be refused in a sentence, or be as it was. With --remote the copy is
served by a web server, and each trial reads it from there as a machine that has fetched nothing: it must be refused by
the URL of the flipped file, and once that is good again, the same machine must read everything, so nothing of it was
kept. Cost: 20 ms per trial for a cache of 6 rows, a second with --remote.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.layout import list_hidden_layers, list_layers, read_header, sequences_dir
from shared.cache.sync.listing import listing_of
from shared.cache.sync.mirror import bring
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import CacheError
from shared.parts.jobs import list_jobs
from shared.parts.mapped_part import MappedBlobs
from shared.parts.records import list_records
from shared.places import STORE_VARIABLE, place_of, with_urls
from shared.remote.transfer import LIST_FILE
from tools.bench.loopback_s3 import serving
from tools.cache.cache_commands import listing


def observed(path: Path) -> bytes:
    """Return everything that a cache says, as bytes.

    Raises:
        CacheError: it says that it is damaged.
    """
    header = read_header(path)
    listed = listing(path)
    for job in listed["jobs"].values():
        del job["planned"]  # the file's date, which no byte of the cache holds
    seen: list[Any] = [listed, header.identity, header.tokenizer_files, read_tokenizer_files(path)]
    for job in list_jobs(path):
        seen += [job.id, job.request, job.rows_per_part, sorted(job.complete_jobs)]
        seen += [job.unit(unit) for unit in range(job.num_units)]
    hidden = next(iter(list_hidden_layers(path)), False)
    for name, layer in list_layers(path).items():
        cache = Cache.open(path, targets=name, hidden=hidden)
        seen += [name, cache.cache_id, cache.stats(), dict(layer.provenance), cache.source_names]
        seen += [column.tobytes() for column in (cache.num_tokens, cache.group_keys, cache.sources)]
        seen += [_row(cache, i) for i in range(len(cache))]
        for record in list_records(layer.directory):
            seen.append(MappedBlobs(layer.directory, record, verify=True).teacher_nll_nats.tobytes())
    folders = [
        sequences_dir(path),
        *(layer.directory for layer in (*list_layers(path).values(), *list_hidden_layers(path).values())),
    ]
    seen += [[record, record.content()] for folder in folders for record in list_records(folder)]
    return pickle.dumps(seen)


def _row(cache: Cache, i: int) -> list[Any]:
    row = cache[i]
    targets, hidden = row.targets, row.hidden
    arrays: list[NDArray[Any]] = [row.token_ids, row.spans]
    if targets is not None:
        arrays += [targets.counts, targets.ids, targets.logprobs, targets.label_logprobs, targets.tail_logmass]
        arrays += [array for draws in targets.draws for array in (draws.counts, draws.ids, draws.multiplicities)]
    if hidden is not None:
        arrays += [hidden.states.values, hidden.states.scales]
        arrays += [] if hidden.pooled is None else [hidden.pooled.values, hidden.pooled.scales]
        arrays += [array for one in hidden.attention for array in (one.counts, one.distances, one.mass_codes)]
    names = [field.name for field in fields(row) if field.name not in ("token_ids", "spans", "targets", "hidden")]
    return [*(getattr(row, name) for name in names), *(array.tobytes() for array in arrays)]


class Machine:
    """Reads a cache from a directory; or from a URL, with a store of its own."""

    def __init__(self, path: Path, url: str | None, store: Path) -> None:
        """Begin with nothing fetched."""
        shutil.rmtree(store, ignore_errors=True)
        self._url = url
        if url is not None:
            os.environ[STORE_VARIABLE] = str(store)
        self._path = path if url is None else place_of(url)

    def observed(self) -> bytes:
        """Return everything that the cache says; errors as for `observed`."""
        if self._url is not None:
            bring(self._path)
        return observed(self._path)

    def names(self, error: CacheError, file: str) -> bool:
        """Tell whether an error names a file of the cache by its URL."""
        return self._url is None or f"{self._url}/{file}" in with_urls(str(error))

    def has_kept_damage(self, truth: bytes) -> bool:
        """Tell whether the cache, good again at its URL, reads otherwise."""
        return self._url is not None and self.observed() != truth


@contextmanager
def served(path: Path) -> Iterator[str]:
    """Yield the URL of a web server for a cache, with the list of files that a push writes."""
    names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    (path / LIST_FILE).write_bytes(listing_of(path, names))
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(path)))) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def run(cache: Path, count: int, seed: int, *, remote: bool = False) -> dict[str, Any]:
    """Flip `count` bytes; return how many were refused, harmless and silent, by kind of file, and each silent one."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="decant-flips-") as directory, ExitStack() as opened:
        path = Path(directory) / "cache"
        shutil.copytree(cache, path)
        url = opened.enter_context(served(path)) if remote else None
        files = sorted(file for file in path.rglob("*") if file.is_file())
        truth = Machine(path, url, Path(directory) / "store").observed()
        outcomes: Counter[str] = Counter()
        silent: list[str] = []
        for trial in range(count):
            file = files[trial % len(files)]
            good = file.read_bytes()
            at, mask = int(rng.integers(len(good))), int(rng.integers(1, 256))
            file.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
            name = "plan" if file.name == "plan.arrow" else f"{file.relative_to(path).parts[0]} {file.suffix[1:]}"
            machine, said = Machine(path, url, Path(directory) / "store"), ""
            try:
                outcome = "harmless" if machine.observed() == truth else "silent"
            except CacheError as error:
                said = str(error)
                outcome = "refused" if machine.names(error, str(file.relative_to(path))) else "refused without its name"
            file.write_bytes(good)
            if machine.has_kept_damage(truth):
                outcome = "kept"
            if outcome not in ("harmless", "refused"):
                silent.append(f"{file.relative_to(path)} byte {at} xor {mask}: {outcome} {said}".rstrip())
            outcomes[f"{name}: {outcome}"] += 1
    return {
        "cache": str(cache),
        "count": count,
        "seed": seed,
        "outcomes": dict(sorted(outcomes.items())),
        "silent": silent,
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="a small cache; it is copied")
    parser.add_argument("--count", type=int, default=10_000, help="flips (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bytes (default: 0)")
    parser.add_argument("--remote", action="store_true", help="flip at a web server, and read from there")
    args = parser.parse_args()
    result = run(args.cache, args.count, args.seed, remote=args.remote)
    print(json.dumps(result, indent=2))
    return 1 if result["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())

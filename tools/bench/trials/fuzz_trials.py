"""Frames, Arrow files and JSON headers altered at will: each is read, or refused in one sentence, and nothing else.

    python -m tools.bench.trials.fuzz_trials --cache data/golden/format-1-sealed/cache --count 1000000

A trial takes a real frame, part, plan or header of the cache and changes a few bytes or numbers: flips, extreme
integers at any offset, cuts, repeats, or pieces of another sample. Checksums are made to agree, so that what lies
behind them is reached: frames are compressed again, JSON is sealed again. Cost: 30 to 400 microseconds per trial;
memory is reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from shared.cache.layout import HiddenLayer, Layer, list_hidden_layers, list_layers, read_header
from shared.errors import CacheError
from shared.parts.jobs import Job
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.parts import map_table
from shared.parts.records import list_records, read_record, sealed_json
from shared.schema import HIDDEN, SEQUENCES, TARGETS

KINDS = ("targets frame", "hidden frame", "part", "plan", "header")
_SHARES = (0.5, 0.3, 0.1, 0.05, 0.05)
_EXTREMES = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63))
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    1e308,
    -0.0,
    "",
    "x" * 40,
    [],
    {},
    [None],
    {"a": 1},
    "\x1b[31m",
)


class Fuzzer:
    """Alters samples of one cache."""

    def __init__(self, cache: Path, scratch: Path, seed: int) -> None:
        """Take the samples; altered files are written below `scratch`."""
        self._rng = np.random.default_rng(seed)
        self._cache, self._scratch = cache, scratch
        self._frames = {"targets frame": _frames(cache, hidden=False), "hidden frame": _frames(cache, hidden=True)}
        self._parts = list(cache.rglob("part-*.arrow"))
        self._plan = next((cache / "jobs").glob("*/plan.arrow"))
        self._headers = [cache / "cache.json", *cache.rglob("layer.json"), *cache.rglob("part-*.json")]
        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)

    def trial(self, kind: str) -> None:
        """Alter one sample of a kind and read it.

        Raises:
            CacheError: it is refused.
        """
        trials: dict[str, Callable[[], None]] = {
            "targets frame": lambda: self._frame("targets frame"),
            "hidden frame": lambda: self._frame("hidden frame"),
            "part": self._part,
            "plan": self._plan_file,
            "header": self._header,
        }
        trials[kind]()

    def _frame(self, kind: str) -> None:
        frames = self._frames[kind]
        codec, content, positions = frames[self._rng.integers(len(frames))]
        if self._rng.random() < 0.7:
            blob = self._compressor.compress(self._altered(content, frames[self._rng.integers(len(frames))][1]))
        else:
            blob = self._altered(self._compressor.compress(content), content)
        if self._rng.random() < 0.1:
            positions = int(self._rng.choice((0, 1, positions + 1, 2**20, 2**20 + 1, 2**31 - 1, -1)))
        codec.decode(blob, positions)

    def _part(self) -> None:
        file = self._parts[self._rng.integers(len(self._parts))]
        directory = self._scratch / file.parent.relative_to(self._cache)
        directory.mkdir(parents=True, exist_ok=True)
        altered = directory / file.name
        altered.write_bytes(self._altered_arrow(file.read_bytes()))
        schema = {"sequences": SEQUENCES, "targets": TARGETS}.get(file.relative_to(self._cache).parts[0], HIDDEN)
        map_table(altered, schema)
        record = next(one for one in list_records(file.parent) if one.stem == file.stem)
        if schema is SEQUENCES:
            sequences = MappedSequences(directory, record, verify=False)
            sequences.num_tokens()
            sequences.sources()
            for i in range(len(sequences)):
                sequences.row(i)
        else:
            blobs = MappedBlobs(directory, record, verify=False)
            rows = MappedSequences(self._cache / "sequences", list_records(self._cache / "sequences")[0], verify=False)
            for i in range(min(len(blobs), len(rows))):
                blobs.blob(i, rows.row(i))

    def _plan_file(self) -> None:
        directory = self._scratch / self._plan.parent.name
        directory.mkdir(exist_ok=True)
        (directory / "plan.arrow").write_bytes(self._altered_arrow(self._plan.read_bytes()))
        job = Job(directory)
        for unit in range(job.num_units):
            job.unit(unit)

    def _header(self) -> None:
        file = self._headers[self._rng.integers(len(self._headers))]
        target = self._scratch / file.relative_to(self._cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._rng.random() < 0.3:
            target.write_bytes(self._altered(file.read_bytes(), b'{"a": [1e999, NaN]}'))
        else:
            document = json.loads(file.read_text(encoding="utf-8"))
            self._change(document)
            target.write_bytes(sealed_json(document))
        if file.name == "cache.json":
            read_header(target.parent)
        elif file.name == "layer.json":
            layer = (HiddenLayer if target.parent.parent.name == "hidden" else Layer).read(target.parent)
            layer.identity.make_codec()
        else:
            read_record(target)

    def _change(self, document: Any) -> None:
        """Replace, remove or add one value somewhere in a document."""
        place, keys = document, list(document) if isinstance(document, dict) else list(range(len(document)))
        while keys:
            key = keys[self._rng.integers(len(keys))]
            inner = place[key]
            if isinstance(inner, dict | list) and inner and self._rng.random() < 0.7:
                place, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                continue
            choice = self._rng.random()
            if choice < 0.15:
                del place[key]
            elif choice < 0.25 and isinstance(place, dict):
                place["added"] = self._value()
            else:
                place[key] = self._value()
            return

    def _value(self) -> Any:
        return _VALUES[self._rng.integers(len(_VALUES))]

    def _altered_arrow(self, data: bytes) -> bytes:
        """Alter the footer or a header mostly, else anything."""
        footer = int.from_bytes(data[-10:-6], "little")
        if self._rng.random() < 0.5:
            start = len(data) - 10 - footer
            return data[:start] + self._altered(data[start:], data)
        if self._rng.random() < 0.6:
            return data[:8] + self._altered(data[8:2000], data) + data[2000:]
        return self._altered(data, data[::-1])

    def _altered(self, data: bytes, other: bytes) -> bytes:
        """Change bytes, or put pieces in or leave them out."""
        rng, changed = self._rng, bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(changed) + 1))
            way = rng.integers(7)
            if way < 3 and at < len(changed):
                changed[at] ^= int(rng.integers(1, 256))
            elif way == 3:
                width = int(rng.choice((2, 4, 8)))
                value = int(_EXTREMES[rng.integers(len(_EXTREMES))]) % (1 << (8 * width))
                changed[at : at + width] = value.to_bytes(width, "little")
            elif way == 4:
                del changed[at : at + int(rng.integers(1, 40))]
            elif way == 5:
                begin = int(rng.integers(len(other) + 1))
                changed[at:at] = other[begin : begin + int(rng.integers(1, 40))]
            else:
                begin = int(rng.integers(len(other) + 1))
                piece = other[begin : begin + int(rng.integers(1, 40))]
                changed[at : at + len(piece)] = piece
        return bytes(changed)


def _frames(cache: Path, *, hidden: bool) -> list[tuple[Any, bytes, int]]:
    """Return codec, content and positions of every frame."""
    found = []
    for layer in (list_hidden_layers(cache) if hidden else list_layers(cache)).values():
        codec = layer.identity.make_codec()
        for record in list_records(layer.directory):
            blobs = MappedBlobs(layer.directory, record, verify=True)
            rows = MappedSequences(
                cache / "sequences", read_record(cache / "sequences" / f"{record.stem}.json"), verify=True
            )
            for i in range(len(blobs)):
                content = zstandard.ZstdDecompressor().decompress(blobs.blob(i, rows.row(i)))
                found.append((codec, content, int(blobs.num_positions[i])))
    return found


def run(cache: Path, count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Try `count` altered samples; return how many of each kind were read and refused, and every other exception."""
    shares = np.array([_SHARES[KINDS.index(kind)] for kind in kinds])
    order = np.random.default_rng([seed, 1]).choice(len(kinds), count, p=shares / shares.sum())
    outcomes = {kind: {"read": 0, "refused": 0} for kind in kinds}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="decant-fuzz-") as directory:
        fuzzer = Fuzzer(cache, Path(directory), seed)
        for trial, number in enumerate(order.tolist()):
            kind = kinds[number]
            try:
                fuzzer.trial(kind)
                outcomes[kind]["read"] += 1
            except CacheError as error:
                outcomes[kind]["refused"] += 1
                if "\n" in str(error):
                    failures.append(f"trial {trial}, {kind}: a message of several lines: {error!r}"[:300])
            except Exception as error:  # noqa: BLE001 - what must not happen, and is reported
                failures.append(f"trial {trial}, {kind}: {type(error).__name__}: {error}"[:300])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"count": count, "seed": seed, "outcomes": outcomes, "peak_mib": peak, "failures": failures}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="a small cache with targets and hidden layers")
    parser.add_argument("--count", type=int, default=1_000_000, help="trials (default: 1000000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    args = parser.parse_args()
    result = run(args.cache, args.count, args.seed)
    print(json.dumps(result, indent=2))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

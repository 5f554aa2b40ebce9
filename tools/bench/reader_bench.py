"""What reading a cache costs: positions per second and core through `cache[i]`, and memory as the cache grows.

Rows are those of the synthetic teacher (k = 64), in a temporary directory. Speed is CPU time of one thread in random
order, after every part was opened once. Memory is what the process holds itself (anonymous pages); pages of mapped
files belong to the system, which takes them back when it needs them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.cache import Cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.keys import group_key, row_key
from shared.parts.sequences import SequenceRow, make_row
from tools.bench.codec_bench import best_cpu_seconds
from tools.bench.process_memory import memory_mib
from tools.bench.synthetic_teacher import VOCAB_SIZE, make_targets

ROWS_PER_PART = 32
K = 64


def run(parts: int = 32) -> dict[str, Any]:
    """Measure reading.

    Args:
        parts: parts of 32 rows of 512 positions in the large cache; the small one has an eighth.

    Returns:
        positions_per_second of rows with 512 and with 64 positions, rows_per_second without targets, milliseconds to
        open, and by how many MiB memory grows while all of the large cache is read.
    """
    with tempfile.TemporaryDirectory(prefix="decant-reader-bench-") as directory:
        root = Path(directory)
        small = build(root / "small", max(1, parts // 8), 512)
        short = build(root / "short", max(1, parts // 8), 64)
        result: dict[str, Any] = {
            "positions_per_second": speed(small),
            "positions_per_second_rows_of_64": speed(short),
            "rows_per_second_without_targets": sequences_speed(small),
        }
        large = build(root / "large", parts, 512)
        before = memory_mib("RssAnon")
        read_all(large)
        result["memory_growth_mib_reading_all"] = memory_mib("RssAnon") - before
        start = time.process_time()
        opened = Cache.open(root / "large")
        opened.num_tokens, opened.group_keys, opened.sources  # noqa: B018 - the work to be timed
        result["open_milliseconds_per_part"] = (time.process_time() - start) * 1000 / parts
        result["cache_mib"] = sum(file.stat().st_size for file in (root / "large").rglob("*.arrow")) / 2**20
    return result


def build(path: Path, parts: int, positions: int) -> Cache:
    """Write a cache of synthetic rows and open it."""
    identity = SequencesIdentity(tokenizer_hash="synthetic", vocab_size=VOCAB_SIZE)
    writer = CacheWriter.create_or_open(path, identity, {"tokenizer.json": b"{}"})
    layer = LayerWriter.create_or_open(
        writer,
        None,
        LayerIdentity(
            teacher="synthetic", weights_hash="", tokenizer_hash="synthetic", vocab_size=VOCAB_SIZE, mode="top", k=K
        ),
        {},
    )
    targets = [make_targets(positions, K, seed) for seed in range(4)]
    for part in range(parts):
        rows = [make_sequence(part * ROWS_PER_PART + i, positions) for i in range(ROWS_PER_PART)]
        stem = f"part-00000000-{part:06d}"
        writer.write_sequences(stem, rows, {})
        layer.write(stem, [row.key for row in rows], [targets[i % 4] for i in range(ROWS_PER_PART)], {})
    return Cache.open(path)


def make_sequence(number: int, positions: int) -> SequenceRow:
    """Return a row of random tokens with a prompt of 32."""
    group = group_key(f"prompt {number}")
    tokens = np.random.default_rng(number).integers(0, VOCAB_SIZE, positions + 32)
    return make_row(
        row_key=row_key(group, {}, 0, None),
        group_key=group,
        source="synthetic",
        prompt="prompt " * 20,
        response="answer " * positions,
        reference=None,
        token_ids=tokens.astype(np.int32),
        spans=[(32, positions + 32)],
        finish_reason="stop",
    )


def read_all(cache: Cache, seed: int = 0) -> int:
    """Read every row in random order; return the number of positions."""
    positions = 0
    for i in np.random.default_rng(seed).permutation(len(cache)):
        row = cache[int(i)]
        assert row.targets is not None
        positions += row.targets.num_positions
    return positions


def speed(cache: Cache) -> float:
    """Return positions per second of CPU time."""
    positions = read_all(cache)
    return positions / best_cpu_seconds(lambda: read_all(cache))


def sequences_speed(cache: Cache) -> float:
    """Return rows per second of CPU time where targets are not asked for."""
    return len(cache) / best_cpu_seconds(lambda: [cache.sequence(i) for i in range(len(cache))])


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))

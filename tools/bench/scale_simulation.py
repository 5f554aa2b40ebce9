"""What the number of parts costs: time and memory to list and open a cache of many parts, from commit records without
data.

    python -m tools.bench.scale_simulation --parts 20000 100000

Records are copies of one of each kind as a real build writes them (rows of the synthetic teacher, k = 64), under the
names of one job, in a temporary directory (TMPDIR; two files of one block per part, 8 GB for a million). Each figure
comes from a process of its own. Files are in the page cache: on a network file system add one round trip per record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.cache.layout import sequences_dir
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.parts.jobs import create_job
from shared.parts.part_stats import ENTROPY_BINS, SUPPORT_BINS
from shared.parts.records import json_bytes, list_records
from shared.schema import FORMAT_VERSION
from tools.bench.process_memory import memory_mib
from tools.own_process import own_command, own_environment

ROWS_PER_PART = 1024
POSITIONS_PER_ROW = 512
CHILD = "import sys; from tools.bench.scale_simulation import measure; measure(sys.argv[1], sys.argv[2])"


def make_records(root: Path, parts: int) -> None:
    """Write cache.json, one layer, the plan of a finished job and `parts` commit records of each kind."""
    positions = ROWS_PER_PART * POSITIONS_PER_ROW
    layer = LayerIdentity(teacher="t", weights_hash="w", tokenizer_hash="t", vocab_size=151_936, mode="top", k=64)
    directory = root / "targets" / f"{layer.name}-{layer.hash8}"
    for path in (sequences_dir(root), directory):
        path.mkdir(parents=True)
    identity = SequencesIdentity(tokenizer_hash="t", vocab_size=151_936)
    header = {"format": FORMAT_VERSION, "identity": identity.to_json(), "tokenizer_files": {}}
    (root / "cache.json").write_bytes(json_bytes(header))
    (directory / "layer.json").write_bytes(
        json_bytes({"format": FORMAT_VERSION, "identity": layer.to_json(), "provenance": {}})
    )
    job = create_job(root, {"simulated": parts}, (), 1)
    software = dict.fromkeys(("decant", "python", "numpy", "pyarrow", "torch", "vllm", "transformers"), "1.2.3")
    figures = {"rows": ROWS_PER_PART, "tokens": 2 * positions, "positions": positions}
    sequences = {
        **figures,
        "sources": {"math": figures, "code": figures},
        "finish_reasons": {"stop": 1000, "length": 24},
    }
    targets = {
        "rows": ROWS_PER_PART,
        "positions": positions,
        "blob_bytes": 156 * positions,
        "support_sum": 64 * positions,
        **{f"{name}_sum": 123_456.789_012_345 for name in ("entropy_nats", "tail_mass", "label_nll_nats")},
        "impossible_labels": 0,
        "entropy_histogram": [positions // ENTROPY_BINS] * ENTROPY_BINS,
        "support_histogram": [positions // SUPPORT_BINS] * SUPPORT_BINS,
    }
    common = {
        "format": FORMAT_VERSION,
        "rows": ROWS_PER_PART,
        "positions": positions,
        "software": software,
        "set_aside": [],
    }
    for number in range(parts):
        stem = f"part-{job.id8}-{number:06d}"
        for folder, stats, size in (
            (sequences_dir(root), sequences, 8 * positions),
            (directory, targets, 156 * positions),
        ):
            record = {**common, "stem": stem, "bytes": size, "xxh3": f"{number:032x}", "stats": stats}
            (folder / f"{stem}.json").write_bytes(json_bytes(record))


def measure(root: str, what: str) -> None:
    """Print seconds and MiB of one operation, as JSON."""
    before, start = memory_mib("RssAnon"), time.perf_counter()
    cpu = time.process_time()
    kept: Sized
    if what == "names":
        kept = [entry.name for entry in os.scandir(Path(root) / "sequences")]
    else:
        kept = list_records(sequences_dir(Path(root))) if what == "list_records" else Cache.open(root)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "mib": memory_mib("RssAnon") - before,
    }
    print(json.dumps({**figures, "items": len(kept)}))


def run(parts: list[int]) -> dict[str, Any]:
    """Return the figures of each operation for each number of parts."""
    result: dict[str, Any] = {}
    for count in parts:
        with tempfile.TemporaryDirectory(prefix="decant-scale-") as directory:
            root = Path(directory) / "cache"
            make_records(root, count)
            result[str(count)] = {what: _in_child(root, what) for what in ("names", "list_records", "open")}
            record_bytes = sum(file.stat().st_size for file in root.rglob("part-*.json"))
            result[str(count)]["record_bytes_per_part"] = record_bytes / count
    return result


def _in_child(root: Path, what: str) -> dict[str, float]:
    child = subprocess.run(  # noqa: S603 - our own interpreter and module
        own_command("-c", CHILD, str(root), what), env=own_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, float] = json.loads(child.stdout)
    return figures


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[20_000, 100_000], help="numbers of parts (default: 20000 100000)"
    )
    print(json.dumps(run(parser.parse_args().parts), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

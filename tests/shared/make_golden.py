"""Write data/golden: small caches with two layers, and what every reader, now or later, must find in them.

`format-1` is of the first version; `format-1-sealed` has a hidden layer too, JSON with checksums, and parts that say
which layer they are of. Run as `python -m tests.shared.make_golden NAME`, once per addition to the format; an existing
golden cache is never written again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.cache import Cache, Row
from tests.shared.small_cache import HYBRID, TOP
from tests.shared.test_hidden_layer import add_hidden

ROOT = Path(__file__).resolve().parents[2] / "data" / "golden"
GOLDENS = ("format-1", "format-1-sealed")
TEXTS = ("source", "prompt", "response", "reference", "finish_reason")
KEYS = ("key", "row_key", "group_key")
ARRAYS = ("counts", "ids", "logprobs", "label_logprobs", "tail_logmass")


def arrays_of(row: Row) -> dict[str, np.ndarray]:
    """Every array of a row by name."""
    assert row.targets is not None
    arrays = {"token_ids": row.token_ids, "spans": row.spans, **{name: getattr(row.targets, name) for name in ARRAYS}}
    for j, drawn in enumerate(row.targets.draws):
        arrays |= {f"draws{j}_{name}": getattr(drawn, name) for name in ("counts", "ids", "multiplicities")}
    return arrays


def texts_of(row: Row) -> dict[str, Any]:
    """Every text and key of a row by name."""
    return {name: getattr(row, name) for name in TEXTS} | {name: getattr(row, name).hex() for name in KEYS}


def main(name: str) -> None:
    """Build a cache and write down what it says."""
    golden = ROOT / name
    if golden.exists():
        sys.exit(f"{golden} exists; it is a promise to older caches and is not made again")
    add_hidden(golden / "cache", last=6, rows_per_part=3, layers=(TOP, HYBRID))
    texts: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for identity in (TOP, HYBRID):
        cache = Cache.open(golden / "cache", targets=identity.name)
        texts[identity.name] = {"cache_id": cache.cache_id, "rows": [texts_of(row) for row in cache]}
        for i, row in enumerate(cache):
            arrays |= {f"{identity.name}/{i}/{name}": value for name, value in arrays_of(row).items()}
    (golden / "expected.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    np.savez_compressed(golden / "expected.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])

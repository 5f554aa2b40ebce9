"""Whether a cache that was interrupted holds what an unbroken one does: every row once, none missing, none damaged,
same values.

Cost: both caches are read once, row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.cache.cache import Cache, Row
from shared.cache.layout import sequences_dir
from shared.cache.reading.verify import verify_cache
from shared.errors import CacheError
from shared.parts.records import list_records

MAX_LISTED = 20


def differences(unbroken: Path, found: Path, tolerance_nats: float) -> list[str]:
    """List what is wrong with `found`, at most a few sentences of each kind.

    Args:
        unbroken: the cache of a build that nothing interrupted.
        found: the cache to judge.
        tolerance_nats: 0 asks for equal targets; else label log-probabilities and tail masses may differ by as much,
            since an engine that batches as requests come rounds differently each time.
    """
    problems = [f"damaged: {problem}" for problem in verify_cache(found)][:MAX_LISTED]
    if problems:
        return problems
    expected = {row.row_key: row for row in _rows(unbroken)}
    try:
        rows = _rows(found)
    except CacheError as error:
        return [f"missing: {error}"]
    keys = [row.row_key for row in rows]
    committed = sum(record.rows for record in list_records(sequences_dir(found)))
    if committed != len(keys) or len(set(keys)) != len(keys):
        problems.append(
            f"repeated: {committed} rows are committed, {len(keys)} are shown, {len(set(keys))} have keys of their own"
        )
    problems += [f"missing: row {key.hex()}" for key in sorted(set(expected) - set(keys))][:MAX_LISTED]
    problems += [f"surplus: row {key.hex()}" for key in sorted(set(keys) - set(expected))][:MAX_LISTED]
    for row in rows:
        same = expected.get(row.row_key)
        if same is None or len(problems) > MAX_LISTED:
            continue
        if not np.array_equal(row.token_ids, same.token_ids) or not np.array_equal(row.spans, same.spans):
            problems.append(f"different: row {row.row_key.hex()} has other tokens")
        elif row.targets is None or same.targets is None:
            problems.append(f"missing: targets of row {row.row_key.hex()}")
        elif tolerance_nats == 0:
            names = ("counts", "ids", "logprobs", "label_logprobs", "tail_logmass")
            if not all(np.array_equal(getattr(row.targets, name), getattr(same.targets, name)) for name in names):
                problems.append(f"different: targets of row {row.row_key.hex()}")
        else:
            labels = np.abs(row.targets.label_logprobs - same.targets.label_logprobs).max()
            tails = np.abs(np.exp(row.targets.tail_logmass) - np.exp(same.targets.tail_logmass)).max()
            if max(labels, tails) > tolerance_nats:
                problems.append(f"different: targets of row {row.row_key.hex()} by {max(labels, tails):.2g}")
    return problems


def _rows(path: Path) -> list[Row]:
    cache = Cache.open(path, verify=True)
    return [cache[index] for index in range(len(cache))]

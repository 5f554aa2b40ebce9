"""`decant cache subset`: some rows of a cache as a cache of their own.

Rows are chosen by source, then by a condition, then by share or number. The last two take the rows whose hash with the
seed is smallest, so the same command chooses the same rows wherever the cache lies, and more of them hold all of fewer.
Parts that stay whole are linked, others are written again without some rows, blobs byte for byte; everything else is as
in a merge. Cost: one read of what stays; with a condition, of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.writing.part_takeover import TakeOver
from shared.errors import CacheError, UsageError
from shared.recipe.base import closest, quoted
from tools.cache.cache_merge import Merge, carry_out, common_layers, fingerprint, how_made, open_source
from tools.cache.row_query import Condition
from tools.cache.staged_directory import DerivedCache

_HASHES = 2.0**64


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows; every condition has to hold."""

    sources: tuple[str, ...] = ()
    query: str | None = None
    share: float | None = None
    """Of the rows that the others leave."""
    count: int | None = None
    seed: int = 0


def subset_cache(
    path: Path,
    out: Path,
    choice: Choice,
    targets: Sequence[str] | None = None,
    copy: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write the chosen rows as a new cache.

    Args:
        path: the cache.
        out: the new one; must not exist, or be the same subset.
        choice: which rows.
        targets: layers to keep, by NAME or NAME-HASH8; None: all.
        copy: copy parts instead of linking them.
        advance: called with the rows that are done.

    Returns:
        cache, job, existed, rows, of, parts, linked, copied, rewritten, layers, hidden_left_out.

    Raises:
        UsageError: no choice at all, a source that is not there, or a condition that is none.
        CacheError: no row is chosen, something is damaged, or `out` is something else.
    """
    if choice == Choice(seed=choice.seed):
        raise UsageError("a subset of every row is the cache itself; say --source, --query, --share or --count")
    if choice.seed and choice.share is None and choice.count is None:
        raise UsageError("--seed is of --share and --count, and neither is said; leave it out, or say one of them")
    source = open_source(path)
    layers, _ = common_layers([source], targets)
    request = {"subset": fingerprint(source, layers), "choice": asdict(choice), "layers": sorted(layers)}
    derived = DerivedCache.of(out, "choosing", "this subset of the cache as it is now", request)
    cache = Cache.open_sequences(path)
    chosen = chosen_rows(cache, choice)
    if not chosen.any():
        raise CacheError(f"{path}: none of its {len(cache):,} rows is chosen; widen the choice")
    done = carry_out(Merge(derived, [source], layers, TakeOver(copy)), _dropped(cache, chosen), advance)
    return {**done, "of": len(cache)}


def chosen_rows(cache: Cache, choice: Choice) -> NDArray[np.bool_]:
    """Return [R] which rows are chosen.

    Raises:
        UsageError: a source that is not there, or a condition that is none.
    """
    chosen = np.ones(len(cache), np.bool_)
    if choice.sources:
        for name in choice.sources:
            if name not in cache.source_names:
                near = closest(name, cache.source_names)
                there = quoted(cache.source_names)
                raise UsageError(f"--source {name}: {cache.path} has no such source (there are: {there}){near}")
        chosen = np.isin(cache.sources, [cache.source_names.index(name) for name in choice.sources])
    if choice.query is not None:
        condition = Condition(choice.query)
        for row in np.flatnonzero(chosen):
            chosen[row] = condition(cache.sequence(int(row)))
    if choice.share is not None or choice.count is not None:
        rows = np.flatnonzero(chosen)
        hashes = np.array(
            [xxhash.xxh3_64_intdigest(key.tobytes(), seed=choice.seed) for key in cache.row_keys[rows]], np.uint64
        )
        kept = hashes < np.float64(_HASHES) * choice.share if choice.share is not None else np.ones(len(rows), np.bool_)
        rows, hashes = rows[kept], hashes[kept]
        rows = rows[np.argsort(hashes, kind="stable")[: choice.count]]
        chosen = np.zeros(len(cache), np.bool_)
        chosen[rows] = True
    return chosen


def _dropped(cache: Cache, chosen: NDArray[np.bool_]) -> dict[int, NDArray[np.bool_]]:
    """Return by part that does not stay whole which of its rows are left out, those that are not shown among them."""
    found = {}
    for number, part in enumerate(cache.parts()):
        kept = np.zeros(part.record.rows, np.bool_)
        kept[slice(None) if part.shown is None else part.shown] = chosen[part.rows.start : part.rows.stop]
        if not kept.all():
            found[number] = ~kept
    return found


def subset_text(result: dict[str, Any]) -> str:
    """Say for people what a subset holds."""
    lines = [
        f"{result['cache']}: {result['rows']:,} of {result['of']:,} rows in {result['parts']:,} parts"
        + how_made(result, "the others")
    ]
    lines += [f"  targets {name}" for name in result["layers"]]
    lines += [f"  hidden {name} left out: hidden layers are not taken over" for name in result["hidden_left_out"]]
    return "\n".join(lines)

"""Whether a place lies in a cache, among whose files nothing else belongs: no export, no report and no other cache.

Cost: two looks per folder above it.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import UsageError


def refuse_within_cache(out: Path) -> None:
    """Refuse a place in the directory of a cache; the cache's own directory is not in it.

    Raises:
        UsageError: it is one.
    """
    for parent in out.resolve().parents:
        if (parent / "cache.json").is_file() and (parent / "sequences").is_dir():
            raise UsageError(f"{out} lies in the cache {parent}, where nothing else belongs; name another place")

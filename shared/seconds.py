"""seconds.json of a run directory: wall seconds per phase, added up over every time a phase computed something."""

from __future__ import annotations

import json
import math
from pathlib import Path

from shared.atomic import make_dir, write_atomic
from shared.errors import DamagedError
from shared.parts.cache_files import read_json


def read_seconds(output_dir: Path) -> dict[str, float]:
    """Return wall seconds by phase; none where nothing ran yet. Phases call it before they work, so nothing is lost.

    Raises:
        DamagedError: the file is there but is not what a run writes.
    """
    path = output_dir / "seconds.json"
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        found = read_json(path)
    except DamagedError as error:
        raise DamagedError(f"{error}; delete it and run the command again") from None
    for phase, seconds in found.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise DamagedError(
                f"{path} says {phase[:60]!r}: {str(seconds)[:60]!r} where seconds are expected; "
                "delete it and run the command again"
            )
    return found


def add_seconds(output_dir: Path, phase: str, seconds: float) -> None:
    """Add wall seconds to a phase; errors as for `read_seconds`."""
    make_dir(output_dir)
    found = read_seconds(output_dir)
    found[phase] = round(found.get(phase, 0.0) + seconds, 3)
    write_atomic(output_dir / "seconds.json", (json.dumps(found, indent=2, sort_keys=True) + "\n").encode(), "seconds")

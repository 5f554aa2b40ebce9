"""seconds.json of a run directory: wall seconds per phase, added up over every time a phase computed something."""

from __future__ import annotations

import json
from pathlib import Path

from shared.atomic import make_dir, write_atomic
from shared.errors import DamagedError


def add_seconds(output_dir: Path, phase: str, seconds: float) -> None:
    """Add wall seconds to a phase.

    Raises:
        DamagedError: the file is there but is not what a run writes.
    """
    make_dir(output_dir)
    path = output_dir / "seconds.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found[phase] = round(float(found.get(phase, 0.0)) + seconds, 3)
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path}: not the seconds of a run ({error}); delete it and run the command again"
        ) from error
    write_atomic(path, (json.dumps(found, indent=2, sort_keys=True) + "\n").encode(), "seconds")

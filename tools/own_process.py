"""How the program starts itself again: the same interpreter, with this program's packages before any others of their
names.

`-P` keeps the directory that a user works in out of the search for modules; PYTHONPATH begins with this clone, so that
a child runs
the same code also where it is not installed. Cost: nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def own_command(*words: str) -> list[str]:
    """Return the command line of a child; `own_command("-m", "tools.cli")` -> [sys.executable, "-P", "-m",
    "tools.cli"].
    """
    return [sys.executable, "-P", *words]


def own_environment() -> dict[str, str]:
    """Return a child's environment."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

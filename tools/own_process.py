"""This program's own packages: are they the ones that run, and how does the program start itself again with them?

Packages named `shared` or `tools` are common, and Python takes the first of that name: a folder where it was started
with `python -m`, or one on PYTHONPATH. Half of the program would then be somebody else's, so that is refused in a
sentence before anything of it is imported. In a child, `-P` keeps the directory that a user works in out of the search,
and PYTHONPATH begins with this clone, so that it runs the same code also where it is not installed. Cost: looking for
three packages, importing none.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "teacher_cache", "student_train")


def require_own_packages() -> None:
    """Leave with exit code 2 and a sentence where a package would come from another place than this one."""
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        spec = find_spec(name) if loaded is None else loaded.__spec__
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        if places and Path(places[0]).resolve() == ROOT / name:
            continue
        found = f"would be loaded from {places[0]}" if places else "is not found"
        print(
            f"decant: error: the package `{name}` {found}; expected {ROOT / name}; start the program as `decant` or "
            "with `python -P -m tools.cli`, and take other folders of that name out of PYTHONPATH",
            file=sys.stderr,
        )
        raise SystemExit(2)


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process without a traceback until the command line turns it into a sentence."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def own_command(*words: str) -> list[str]:
    """Return the command line of a child; `own_command("-m", "tools.cli")` -> [PYTHON, "-P", "-m", "tools.cli"]."""
    return [sys.executable, "-P", *words]


def own_environment() -> dict[str, str]:
    """Return a child's environment."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

"""Where the command `decant` begins: a name that no other package has, so that another package named `tools` can be
told.

Cost: looking for one package.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

TOOLS = Path(__file__).resolve().parent / "tools"

if "DECANT_PARENT" in os.environ:  # a process that multiprocessing spawned imports this first, and vLLM seconds later
    from shared.process.parent_watch import end_with_parent

    end_with_parent()


def main() -> int:
    """Run the command line and return its exit code; 2 where its package `tools` is another's."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the command line says a sentence instead
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    spec = find_spec("tools")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places or Path(places[0]).resolve() != TOOLS:
        found = f"would be loaded from {places[0]}" if places else "is not found"
        print(
            f"decant: error: the package `tools` {found}; expected {TOOLS}; take other folders of that name out of "
            "PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    from tools.cli import main as run

    return run()

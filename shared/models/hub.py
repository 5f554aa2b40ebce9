"""Is a model hub there? Asked once, since its library tries for a minute before it says that none is.

Cost: one request; at most `SECONDS` where nothing answers.
"""

from __future__ import annotations

import os
from pathlib import Path

SECONDS = 5.0
"""How long the hub is waited for."""
_asked: set[str] = set()
"""Hubs that were asked."""


def ask_hub(source: str | Path) -> None:
    """Where `source` is no directory and no hub answers, let the hub's library look into its local cache alone.

    >>> ask_hub(".")
    """
    if Path(source).expanduser().is_dir():
        return
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or constants.ENDPOINT in _asked:
        return
    _asked.add(constants.ENDPOINT)
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # noqa: BLE001 - its library and network raise whatever they like; all of it means no answer
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started from here

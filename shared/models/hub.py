"""Is a model hub there? Asked once, since its library tries for a minute before it says that none is.

Cost: one request; at most `SECONDS` where nothing answers.
"""

from __future__ import annotations

import os
from pathlib import Path

SECONDS = 5.0
"""How long the hub is waited for."""
_silent: dict[str, bool] = {}
"""Whether a hub that was asked gave no answer."""


def ask_hub(source: str | Path) -> str | None:
    """Where `source` is no directory and no hub answers, let the hub's library look into its local cache alone, and say
    so.

    >>> ask_hub(".")
    """
    if Path(source).expanduser().is_dir():
        return None
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE and constants.ENDPOINT not in _silent:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            _silent[constants.ENDPOINT] = False
        except Exception:  # noqa: BLE001 - its library and network raise whatever they like; all of it means no answer
            _silent[constants.ENDPOINT] = constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started from here
    is_silent = _silent.get(constants.ENDPOINT, False)
    return f"{constants.ENDPOINT} does not answer, and it is not in the local cache" if is_silent else None

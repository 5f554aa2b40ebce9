"""Processes that train together, as a launcher such as torchrun starts them: who writes, and who waits.

Only the first process writes files that belong to all; the others wait until they are there. Cost: a barrier.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from shared.errors import UsageError

Result = TypeVar("Result")


def num_processes() -> int:
    """Return how many processes train together.

    Raises:
        UsageError: the environment says no number.
    """
    return max(1, _said("WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this process writes what belongs to all: one alone does, whatever RANK a batch system gave it;
    errors as for `num_processes`.
    """
    return num_processes() == 1 or _said("RANK", 0) == 0


def _said(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UsageError(
            f"{name}={text} in the environment is no number of processes that train together; start several with "
            "torchrun, or unset it"
        )
    return int(text)


def wait_for_all() -> None:
    """Wait until every process is here; at once where there is one."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def first_then_others(action: Callable[[], Result]) -> Result:
    """Run an action in the first process and, once it is done or has failed there, in the others."""
    if not is_first():
        wait_for_all()
        return action()
    try:
        return action()
    finally:
        wait_for_all()

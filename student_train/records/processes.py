"""Processes that train together, as a launcher such as torchrun starts them: who writes, and who waits.

Only the first process writes files that belong to all; the others wait until they are there. Cost: a barrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def num_processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process writes what belongs to all."""
    return int(os.environ.get("RANK", "0")) == 0


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

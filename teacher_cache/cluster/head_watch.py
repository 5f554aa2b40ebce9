"""Does the head of the Ray cluster still answer? Ray ends a driver whose head is gone for a minute, without a word of
what to do, so it is said before; and it waits for minutes for one that was never there.

Cost: a connection every few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0
GONE_SECONDS = 15.0
"""Less than the minute after which Ray ends the process."""


class HeadWatch:
    """Says once that the head does not answer, each time that it went away."""

    def __init__(self, address: str) -> None:
        """Remember the `host:port` of the cluster's control service."""
        self._address = address
        self._asked = self._answered = time.monotonic()
        self._is_said = False

    def look(self) -> None:
        """Ask, where the last time is some seconds ago."""
        now = time.monotonic()
        if now - self._asked < PAUSE_SECONDS:
            return
        self._asked = now
        if head_answers(self._address):
            self._answered, self._is_said = now, False
        elif now - self._answered >= GONE_SECONDS and not self._is_said:
            self._is_said = True
            logger.warning(
                "the head of the Ray cluster at %s does not answer; Ray ends this build if it stays away for a minute, "
                "and what was committed stays: start the cluster again, then the same command continues",
                self._address,
            )


def head_answers(address: str) -> bool:
    """Tell whether something listens at `host:port`; an address of another form, such as `auto`, is taken to."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return True
    with contextlib.suppress(OSError, OverflowError), socket.create_connection((host.strip("[]"), int(port)), 2.0):
        return True
    return False

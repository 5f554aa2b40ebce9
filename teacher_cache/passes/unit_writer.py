"""One thread that encodes and commits finished units while the engine works on the next.

The queue is bounded, so a slow disk slows the engine instead of filling memory. The thread outlives a failure: it keeps
taking units without writing them, so the producer never waits for a dead consumer, and the failure is raised from the
next call of `submit`, `check` or `close`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

Write = Callable[[], object]


class UnitWriter:
    """Runs writes in order, in its own thread; a context manager that waits for them."""

    def __init__(self, max_waiting: int = 2) -> None:
        """Start the thread; at most `max_waiting` units wait for it."""
        self._queue: queue.Queue[Write | None] = queue.Queue(maxsize=max_waiting)
        self._failure: Exception | None = None
        self._abandoned = False
        self.seconds = 0.0
        """Time spent encoding and writing."""
        self.seconds_full = 0.0
        """Time that the producer waited for a place in the queue."""
        self.seconds_draining = 0.0
        """Time that it waited at the end for the last writes."""
        self._thread = threading.Thread(target=self._run, name="decant-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> None:
        """Queue one unit's write, waiting while the queue is full.

        Raises:
            Exception: whatever an earlier write raised.
        """
        self.check()
        started = time.monotonic()
        self._queue.put(write)
        self.seconds_full += time.monotonic() - started

    def check(self) -> None:
        """Raise what an earlier write raised, if one did."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for queued units (after an error: for the one being written only), then raise what a write raised."""
        self._abandoned = error is not None
        started = time.monotonic()
        self._queue.put(None)
        self._thread.join()
        self.seconds_draining += time.monotonic() - started
        if error is None:
            self.check()

    def _run(self) -> None:
        while (write := self._queue.get()) is not None:
            if self._failure is not None or self._abandoned:
                continue
            started = time.monotonic()
            try:
                write()
            except Exception as error:  # noqa: BLE001 - kept for the thread that waits for it
                self._failure = error
            self.seconds += time.monotonic() - started
